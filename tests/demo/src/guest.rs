//! A tenant's guest, as the operator and its consumer see it.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::console::Console;
use crate::consumer::Consumer;
use crate::omerta::{Omerta, text};
use crate::report::Report;

/// How long a guest may take from `vm run` to its handshake. Without KVM, on a busy machine, a boot
/// takes several seconds, and minutes where the machine is overloaded.
const BOOT: Duration = Duration::from_secs(180);

/// A running guest.
pub struct Guest {
    pub name: String,
    pub interface: String,
    pub address: Ipv4Addr,
    pub gateway: Ipv4Addr,
    pub mac: String,
    pub pid: u32,
    console: String,
}

impl Guest {
    /// Asks for a guest. It boots while this returns.
    pub fn run(
        omerta: &Omerta,
        name: &str,
        image: &str,
        consumer: &Consumer,
        on_violation: &str,
    ) -> Result<Self> {
        let tunnel_address = format!("{}/24", consumer.tunnel_guest);
        let tunnel_peer = consumer.tunnel_peer.to_string();
        let shown = omerta.json(&[
            "vm",
            "run",
            "--name",
            name,
            "--image",
            image,
            "--consumer",
            &consumer.spec(),
            "--tunnel-address",
            &tunnel_address,
            "--tunnel-peer",
            &tunnel_peer,
            "--on-violation",
            on_violation,
            "--console-shell",
            // What the guard stops is shown by a guest whose own witness is silent.
            "--no-agent",
        ])?;
        let address = |field| -> Result<Ipv4Addr> {
            text(&shown, field)?
                .parse()
                .with_context(|| format!("{field} of {name} is no address"))
        };
        let guest = Self {
            name: name.to_owned(),
            interface: text(&shown, "interface")?.to_owned(),
            address: address("address")?,
            gateway: address("gateway")?,
            mac: text(&shown, "mac")?.to_owned(),
            pid: u32::try_from(
                shown
                    .get("pid")
                    .and_then(Value::as_u64)
                    .context("vm run told no pid")?,
            )?,
            console: text(&shown, "console")?.to_owned(),
        };
        // That a process is gone says something only of one that was the guest's.
        let arguments = fs::read_to_string(format!("/proc/{}/cmdline", guest.pid));
        if !arguments.is_ok_and(|text| text.contains(&format!("guest={name},"))) {
            bail!("process {} is not the QEMU of {name}", guest.pid);
        }
        Ok(guest)
    }

    /// Waits for the guest's key, hands it to the consumer, and waits for the handshake that both
    /// must have seen.
    pub fn introduce(&self, omerta: &Omerta, consumer: &Consumer, report: &Report) -> Result<()> {
        let key = report.wait(&format!("{} boots", self.name), BOOT, || {
            let shown = self.show(omerta)?;
            Ok(shown
                .get("public_key")
                .and_then(Value::as_str)
                .map(str::to_owned))
        })?;
        consumer.welcome(&key)?;
        report.wait(
            &format!("{} and its consumer shake hands", self.name),
            BOOT,
            || {
                let reported =
                    self.show(omerta)?.get("handshake").and_then(Value::as_bool) == Some(true);
                Ok((reported && consumer.has_shaken_hands()?).then_some(()))
            },
        )
    }

    fn show(&self, omerta: &Omerta) -> Result<Value> {
        let shown = omerta.json(&["vm", "show", &self.name])?;
        match text(&shown, "state")? {
            "ended" => bail!("{} has ended: {shown}", self.name),
            _ => Ok(shown),
        }
    }

    /// A shell in the guest, as root.
    pub fn console(&self) -> Result<Console> {
        Console::connect(&self.name, Path::new(&self.console))
    }
}
