//! From a [`Spec`] to QEMU's arguments: pure, so that every guarantee in it is unit tested.
//!
//! No free text of the spec reaches QEMU's option parser: names and addresses come from types that
//! hold no comma, paths are the jail's own, and what the guest is told goes through a file.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;

use omerta_agent::message::PORT_NAME as AGENT_PORT_NAME;

use crate::jail::{CONFIG, INITRD, KERNEL};
use crate::{Accel, MachineType, Spec, StoredDisk};

/// The program that runs guests.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// The name of the virtio-serial port on which the guest reports.
pub(crate) const CONTROL_PORT_NAME: &str = "org.omerta.control";

/// Where the guest finds its configuration in fw_cfg.
pub(crate) const CONFIG_FW_CFG: &str = "opt/omerta/config";

/// The sandbox that QEMU puts itself in. `spawn=deny` also means that no bridge helper or
/// network script can ever run.
pub(crate) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The most memory that TCG may take for translated code, in MiB. Without this QEMU takes up to
/// 1 GiB for each guest, whatever the guest's own memory. When it is full, QEMU starts it anew.
const TCG_CACHE_MIB: u32 = 32;

/// Under which numbers QEMU finds what is open for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptors {
    pub(crate) tap: RawFd,
    /// A socket that listens, as the next three.
    pub(crate) qmp: RawFd,
    pub(crate) console: RawFd,
    pub(crate) control: RawFd,
    pub(crate) agent: Option<RawFd>,
    /// A file, open for appending.
    pub(crate) console_log: RawFd,
    pub(crate) disks: Option<DiskDescriptors>,
}

/// Under which numbers it finds disks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskDescriptors {
    /// Open for reading alone.
    pub(crate) base: RawFd,
    pub(crate) layer: RawFd,
    /// Open for reading alone.
    pub(crate) seed: Option<RawFd>,
}

/// QEMU's arguments for `spec`, in its jail.
pub(crate) fn arguments(spec: &Spec, open: &Descriptors) -> Vec<OsString> {
    let mut args = Arguments::default();
    args.flag("-no-user-config").flag("-nodefaults");
    args.option(
        "-name",
        format!("guest={},process=omerta:{}", spec.name, spec.name),
    );
    args.option("-sandbox", SANDBOX);
    if spec.machine == MachineType::Q35 {
        // The firmware offers no sleep. A guest that writes the registers itself sleeps all the
        // same: see `Qmp::stop`. The other machine has no such registers.
        for state in ["disable_s3=1", "disable_s4=1"] {
            args.option("-global", format!("ICH9-LPC.{state}"));
        }
    }
    // A guest's memory holds its private key: keep it out of any core dump.
    args.option(
        "-machine",
        format!("{},dump-guest-core=off", spec.machine.argument()),
    );
    match spec.accel {
        Accel::Kvm => args.option("-accel", "kvm").option("-cpu", "host"),
        Accel::Tcg => args
            .option(
                "-accel",
                format!("tcg,thread=multi,tb-size={TCG_CACHE_MIB}"),
            )
            .option("-cpu", "max"),
    };
    args.option("-smp", spec.cpus.to_string());
    args.option("-m", format!("{}M", spec.memory_mib));
    args.option("-display", "none");
    // Nothing runs until the guard is proven: QEMU waits in `prelaunch` for `cont`.
    args.flag("-S");
    args.option("-action", "panic=pause");

    args.option("-kernel", KERNEL);
    args.option("-initrd", INITRD);
    args.option("-append", kernel_line(spec));
    args.option("-fw_cfg", format!("name={CONFIG_FW_CFG},file={CONFIG}"));

    let socket = |id, fd| format!("socket,id={id},fd={fd},server=on,wait=off");
    args.option("-chardev", socket("qmp", open.qmp));
    args.option("-mon", "chardev=qmp,mode=control");

    // By number, for the jail has no path to the log.
    args.option("-add-fd", format!("set=1,fd={}", open.console_log));
    let console = socket("console", open.console);
    args.option(
        "-chardev",
        format!("{console},logappend=on,logfile=/dev/fdset/1"),
    );
    args.option("-serial", "chardev:console");

    args.option("-chardev", socket("control", open.control));
    // One more than there are: the first is a console's.
    args.option("-device", "virtio-serial-pci,id=ports,max_ports=3");
    args.option(
        "-device",
        format!("virtserialport,bus=ports.0,chardev=control,name={CONTROL_PORT_NAME}"),
    );
    if let Some(fd) = open.agent {
        args.option("-chardev", socket("agent", fd));
        args.option(
            "-device",
            format!("virtserialport,bus=ports.0,chardev=agent,name={AGENT_PORT_NAME}"),
        );
    }

    // Everything the guest sends goes through this one descriptor. vhost is off: its kernel worker
    // sends without QEMU, so that `stop` would have to be trusted to reach two places.
    args.option(
        "-netdev",
        format!("tap,id=uplink,fd={},vhost=off", open.tap),
    );
    args.option(
        "-device",
        format!("virtio-net-pci,netdev=uplink,mac={},romfile=", spec.mac),
    );

    if let (Some(disk), Some(disks)) = (spec.image.disk(), &open.disks) {
        disk_arguments(&mut args, disk, disks);
    }
    args.option("-device", "virtio-rng-pci");
    // The port for firmware and small kernels, the PCI device for Linux.
    args.option("-device", "pvpanic")
        .option("-device", "pvpanic-pci");
    args.0
}

/// Disks by number, each by the format that the manifest names: QEMU opens no path and guesses nothing,
/// and what a layer lies above it is told here, never by the layer's header. The launcher holds what the
/// files are locked for.
fn disk_arguments(args: &mut Arguments, disk: &StoredDisk, open: &DiskDescriptors) {
    let mut file = |set: u8, fd: RawFd, node: &str, access: &str| {
        args.option("-add-fd", format!("set={set},fd={fd}"));
        args.option(
            "-blockdev",
            format!("driver=file,node-name={node}-file,filename=/dev/fdset/{set},locking=off,auto-read-only=off,read-only={access}"),
        );
    };
    file(2, open.base, "base", "on");
    file(3, open.layer, "layer", "off");
    if let Some(seed) = open.seed {
        file(4, seed, "seed", "on");
    }
    let format = disk.format.word();
    args.option(
        "-blockdev",
        format!("driver={format},node-name=base,file=base-file,read-only=on"),
    );
    // What the guest discards stays reserved for it.
    args.option(
        "-blockdev",
        "driver=qcow2,node-name=layer,file=layer-file,backing=base,discard=ignore",
    );
    // An error is the guest's to handle: it is not stopped for it.
    let errors = "rerror=report,werror=report";
    args.option(
        "-device",
        format!("virtio-blk-pci,drive=layer,serial=omerta-disk,{errors}"),
    );
    if open.seed.is_some() {
        args.option(
            "-blockdev",
            "driver=raw,node-name=seed,file=seed-file,read-only=on",
        );
        args.option(
            "-device",
            format!("virtio-blk-pci,drive=seed,serial=omerta-seed,{errors}"),
        );
    }
}

/// What the guest's kernel is told. At boot it checks that its timer ticks, and panics where it does
/// not in time, as may happen to an emulated guest of a busy host: such a guest skips that check.
fn kernel_line(spec: &Spec) -> String {
    let mut line = "console=ttyS0 quiet panic=1".to_owned();
    if spec.accel == Accel::Tcg {
        line.push_str(" no_timer_check");
    }
    if let Some(disk) = spec.image.disk() {
        // The interface has the name that the firewall knows.
        line.push_str(&format!(" root=/dev/{} rw net.ifnames=0", disk.root));
    }
    line
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.as_ref().to_owned());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::{spec, spec_with_disk};

    fn lines(spec: &Spec) -> Vec<String> {
        let open = Descriptors {
            tap: 9,
            qmp: 10,
            console: 11,
            control: 12,
            agent: spec.agent.map(|_| 20),
            console_log: 13,
            disks: spec.image.disk().map(|disk| DiskDescriptors {
                base: 20,
                layer: 21,
                seed: disk.has_seed.then_some(22),
            }),
        };
        arguments(spec, &open)
            .into_iter()
            .map(|argument| argument.into_string().unwrap())
            .collect()
    }

    fn values<'a>(lines: &'a [String], option: &str) -> Vec<&'a str> {
        lines
            .windows(2)
            .filter(|w| w[0] == option)
            .map(|w| w[1].as_str())
            .collect()
    }

    #[test]
    fn the_guest_starts_stopped_and_sandboxed() {
        let lines = lines(&spec());
        for flag in ["-S", "-nodefaults", "-no-user-config"] {
            assert_eq!(lines.iter().filter(|l| *l == flag).count(), 1, "{flag}");
        }
        assert_eq!(values(&lines, "-sandbox"), [SANDBOX]);
        assert_eq!(values(&lines, "-action"), ["panic=pause"]);
        assert_eq!(values(&lines, "-display"), ["none"]);
    }

    #[test]
    fn the_tap_is_the_only_network() {
        let lines = lines(&spec());
        assert_eq!(values(&lines, "-netdev"), ["tap,id=uplink,fd=9,vhost=off"]);
        let cards: Vec<_> = values(&lines, "-device")
            .into_iter()
            .filter(|d| d.contains("net"))
            .collect();
        assert_eq!(
            cards,
            ["virtio-net-pci,netdev=uplink,mac=52:54:00:12:34:56,romfile="]
        );
        for option in ["-nic", "-net", "-usb", "-drive", "-virtfs", "-fsdev"] {
            assert!(!lines.iter().any(|l| l == option), "{option}");
        }
    }

    #[test]
    fn the_firmware_offers_no_sleep() {
        let lines = lines(&spec());
        assert_eq!(
            values(&lines, "-global"),
            ["ICH9-LPC.disable_s3=1", "ICH9-LPC.disable_s4=1"]
        );
    }

    #[test]
    fn the_machine_has_no_device_that_was_not_asked_for() {
        let mut with = spec();
        for (machine, expected) in [
            (
                MachineType::Q35,
                "q35,usb=off,vmport=off,dump-guest-core=off",
            ),
            (
                MachineType::Microvm,
                "microvm,acpi=on,pcie=on,rtc=on,isa-serial=on,usb=off,dump-guest-core=off",
            ),
        ] {
            with.machine = machine;
            let lines = lines(&with);
            assert_eq!(values(&lines, "-machine"), [expected]);
            let sleeps = machine == MachineType::Q35;
            assert_eq!(!values(&lines, "-global").is_empty(), sleeps);
        }
    }

    #[test]
    fn an_emulated_guest_does_not_check_its_timer() {
        let mut with = spec();
        for (accel, unchecked) in [(Accel::Kvm, false), (Accel::Tcg, true)] {
            with.accel = accel;
            let lines = lines(&with);
            let words: Vec<_> = values(&lines, "-append")[0].split(' ').collect();
            assert_eq!(words.contains(&"no_timer_check"), unchecked, "{accel:?}");
        }
    }

    #[test]
    fn each_accelerator_has_its_cpu() {
        let mut with = spec();
        with.accel = Accel::Kvm;
        assert_eq!(values(&lines(&with), "-accel"), ["kvm"]);
        assert_eq!(values(&lines(&with), "-cpu"), ["host"]);
        with.accel = Accel::Tcg;
        assert_eq!(
            values(&lines(&with), "-accel"),
            ["tcg,thread=multi,tb-size=32"]
        );
        assert_eq!(values(&lines(&with), "-cpu"), ["max"]);
    }

    #[test]
    fn qemu_has_no_path_of_the_hosts() {
        let mut with = spec();
        with.run_dir = "/run/somewhere".into();
        with.image.kernel = "/images/somewhere/vmlinuz".into();
        with.image.initrd = "/images/somewhere/initrd.img".into();
        let lines = lines(&with);
        assert!(!lines.iter().any(|l| l.contains("somewhere")), "{lines:?}");
        assert_eq!(
            values(&lines, "-chardev"),
            [
                "socket,id=qmp,fd=10,server=on,wait=off",
                "socket,id=console,fd=11,server=on,wait=off,logappend=on,logfile=/dev/fdset/1",
                "socket,id=control,fd=12,server=on,wait=off",
            ]
        );
        assert_eq!(values(&lines, "-add-fd"), ["set=1,fd=13"]);
    }

    #[test]
    fn an_agent_has_a_port_of_its_own_and_no_guest_without_one_has() {
        let ports = |spec: &Spec| -> Vec<String> {
            let lines = lines(spec);
            let devices = values(&lines, "-device");
            let of_ports = devices.iter().filter(|d| d.contains("serialport"));
            of_ports.map(|d| (*d).to_owned()).collect()
        };
        let control = "virtserialport,bus=ports.0,chardev=control,name=org.omerta.control";
        assert_eq!(ports(&spec()), [control]);
        let mut with = spec();
        with.agent = Some(crate::spec::tests::agent());
        let agent = "virtserialport,bus=ports.0,chardev=agent,name=org.omerta.agent";
        assert_eq!(ports(&with), [control, agent]);
        let socket = "socket,id=agent,fd=20,server=on,wait=off";
        assert!(lines(&with).iter().any(|l| l == socket));
    }

    #[test]
    fn disks_are_named_by_number_and_format_and_the_image_is_never_written() {
        let with = spec_with_disk();
        let lines = lines(&with);
        let nodes = values(&lines, "-blockdev");
        assert!(nodes.contains(&"driver=file,node-name=base-file,filename=/dev/fdset/2,locking=off,auto-read-only=off,read-only=on"));
        assert!(nodes.contains(&"driver=raw,node-name=base,file=base-file,read-only=on"));
        assert!(
            nodes.contains(
                &"driver=qcow2,node-name=layer,file=layer-file,backing=base,discard=ignore"
            )
        );
        for node in &nodes {
            let is_writable = node.contains("node-name=layer");
            assert_eq!(node.contains("read-only=on"), !is_writable, "{node}");
            assert!(!node.contains("/img"), "{node}");
        }
        assert_eq!(
            values(&lines, "-add-fd"),
            ["set=1,fd=13", "set=2,fd=20", "set=3,fd=21", "set=4,fd=22"]
        );
        assert!(values(&lines, "-append")[0].ends_with(" root=/dev/vda1 rw net.ifnames=0"));
        let without = values(&self::lines(&spec()), "-blockdev").len();
        assert_eq!(without, 0);
    }
}
