//! What to run: everything the launcher needs to know of one guest, validated.

use std::fmt::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::num::NonZero;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use omerta_agent::heartbeat::Timing as AgentTiming;
use omerta_dataplane::{DirectionLimits, Owner};
use omerta_tunnel::Secret;
use omerta_verdict::{Address, Endpoint, Mac, Mode, Protocol};
use zeroize::Zeroizing;

use crate::{GuestName, Image, Jail, LayerSpec, MachineType, SshPublicKey, WgPublicKey};

/// How QEMU executes the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation: slower, works everywhere.
    Tcg,
}

impl Accel {
    /// The word QEMU and the CLI use.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The one remote a guest may reach: its consumer's WireGuard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consumer {
    /// The consumer's WireGuard public key.
    pub public_key: WgPublicKey,
    /// Where the consumer's WireGuard listens (UDP).
    pub endpoint: SocketAddrV4,
}

impl Consumer {
    /// The endpoint as an allowlist entry.
    pub fn allowed_endpoint(&self) -> Endpoint {
        Endpoint {
            protocol: Protocol::Udp,
            address: Address::from(std::net::IpAddr::V4(*self.endpoint.ip())),
            port: self.endpoint.port(),
        }
    }
}

/// The guest's side of the tunnel to its consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The guest's address in the tunnel.
    pub address: Ipv4Addr,
    /// The tunnel network's prefix length, 0 to 32.
    pub prefix: u8,
    /// The consumer's address in the tunnel.
    pub peer: Ipv4Addr,
}

/// One guest to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The guest's name.
    pub name: GuestName,
    /// What it boots.
    pub image: Image,
    /// The guest's own disk above the image's, where that has one.
    pub layer: Option<LayerSpec>,
    /// Who may log in as root by SSH, through the tunnel, where the image asks for a seed.
    pub ssh_key: Option<SshPublicKey>,
    /// How many virtual CPUs, 1 to [`Spec::MAX_CPUS`].
    pub cpus: u8,
    /// Memory in MiB, [`Spec::MIN_MEMORY_MIB`] to [`Spec::MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// The guest's MAC address.
    pub mac: Mac,
    /// The guest's address; a /32.
    pub address: Ipv4Addr,
    /// The host's address on the tap; a /32.
    pub gateway: Ipv4Addr,
    /// The name of the tap to create, at most 15 bytes.
    pub tap: String,
    /// The one remote.
    pub consumer: Consumer,
    /// The tunnel to it.
    pub tunnel: Tunnel,
    /// What both ends of the tunnel know beside their keys. One who takes over a guest has no use for it.
    pub preshared_key: Option<Secret>,
    /// Seconds between the packets that keep the tunnel's way open, up to [`Spec::MAX_KEEPALIVE`].
    pub keepalive: NonZero<u16>,
    /// What the guest reaches in a tunnel that the host keeps for it; empty where the guest keeps its own.
    pub reach: Vec<Endpoint>,
    /// How the guard filters.
    pub mode: Mode,
    /// How much it lets pass.
    pub limits: DirectionLimits,
    /// Whether the serial console offers a root shell (`true`) or only the log (`false`).
    pub console_shell: bool,
    /// How to execute the guest.
    pub accel: Accel,
    /// On which machine.
    pub machine: MachineType,
    /// A directory for this guest alone: sockets, console log, configuration. Its parent must
    /// exist; the directory is made at launch and removed at the end.
    pub run_dir: PathBuf,
    /// What the jail around its QEMU may lack, and beside what it has.
    pub jail: Jail,
    /// In whose name the guard is attached, so that nobody else changes or removes it by mistake.
    pub guard_owner: Option<Owner>,
    /// How long after its launcher was last there the guard lets anything pass; `None` is for ever. Renewed
    /// each time that the guard is looked at and is what was proven.
    pub guard_lease: Option<Duration>,
    /// Whether what its guard allows passes the host's stack by, where the kernel can (`Guard::redirect`).
    pub redirect: bool,
    /// Whether it lives on when its launcher dies, for another to adopt or to end. Its QEMU dies with the
    /// launcher otherwise.
    pub outlives_launcher: bool,
    /// When its agent is asked, and what it is told to do by itself; `None` for an image without an agent.
    pub agent: Option<AgentTiming>,
}

/// Why a spec cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Too few or too many CPUs.
    #[error("cpus is {0}: give 1 to {max}", max = Spec::MAX_CPUS)]
    Cpus(u8),
    /// Too little or too much memory.
    #[error("memory is {0} MiB: give {min} to {max}", min = Spec::MIN_MEMORY_MIB, max = Spec::MAX_MEMORY_MIB)]
    Memory(u32),
    /// The MAC is a group address or zero.
    #[error("MAC {0} is not one interface's: give a unicast address, as in 52:54:00:12:34:56")]
    Mac(Mac),
    /// The tap's name cannot be an interface's.
    #[error("tap name `{}` is unusable: give 1 to 15 of A-Z, a-z, 0-9, -, _ and ., beginning with a letter", .0.escape_default())]
    Tap(String),
    /// An address cannot be a host's.
    #[error("{what} {address} is not a host's address: give a unicast address")]
    Address {
        /// Which of the spec's addresses.
        what: &'static str,
        /// The address.
        address: Ipv4Addr,
    },
    /// Two addresses that must differ are the same.
    #[error("{0} is given to two parties: guest, gateway and consumer need an address each")]
    SameAddress(Ipv4Addr),
    /// The consumer's port is zero.
    #[error("the consumer's port is 0: give the port its WireGuard listens on")]
    ConsumerPort,
    /// The tunnel does not lead there.
    #[error(
        "{0} is not at the consumer's address in the tunnel, the only one that a tunnel of the host's leads to"
    )]
    Reach(Endpoint),
    /// A tunnel that is up would look dead.
    #[error("keepalive is {0} s: give 1 to {max}", max = Spec::MAX_KEEPALIVE)]
    Keepalive(u16),
    /// The tunnel's prefix is too long.
    #[error("the tunnel's prefix is {0}: give 0 to 32")]
    TunnelPrefix(u8),
    /// There is a disk where there should be none, or none where there should be one.
    #[error(
        "the image and the guest differ in whether there is a disk: give a disk's size for an image that has one, and none otherwise"
    )]
    Disk,
    /// The disk is smaller than the image's.
    #[error("a disk of {given} MiB is smaller than the image's: give {least} MiB or more")]
    DiskSmall {
        /// Its size in MiB.
        given: u64,
        /// The image's, in MiB.
        least: u64,
    },
    /// There is a key for an image that takes none.
    #[error("the image takes no SSH key: give one for an image with a seed for cloud-init alone")]
    SshKey,
    /// The run directory is relative.
    #[error("run directory {} is not an absolute path", .0.display())]
    RunDirRelative(PathBuf),
    /// The run directory's path leaves no room for a socket's name (108 bytes in all).
    #[error("run directory {} is too long: unix sockets allow {max} bytes", .0.display(), max = Spec::MAX_RUN_DIR_BYTES)]
    RunDirLong(PathBuf),
}

impl Spec {
    /// The most virtual CPUs.
    pub const MAX_CPUS: u8 = 64;
    /// The least memory, in MiB: what the image needs to unpack itself.
    pub const MIN_MEMORY_MIB: u32 = 64;
    /// The most memory, in MiB.
    pub const MAX_MEMORY_MIB: u32 = 1 << 20;
    /// The longest run directory, in bytes: `sun_path` less the longest socket name.
    pub const MAX_RUN_DIR_BYTES: usize = 90;

    /// Seconds between the packets that keep a tunnel's way open, where nobody says otherwise.
    pub const KEEPALIVE: NonZero<u16> = NonZero::new(25).unwrap();
    /// The most such seconds: as long as WireGuard goes without other keys, so that a tunnel that is up is heard that often.
    pub const MAX_KEEPALIVE: NonZero<u16> = NonZero::new(120).unwrap();
    /// The longest that a guest reads. A text that grows leaves copies of its key behind.
    const MAX_CONFIG_BYTES: usize = 1024;

    /// Checks what the fields' types do not say.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(1..=Self::MAX_CPUS).contains(&self.cpus) {
            return Err(SpecError::Cpus(self.cpus));
        }
        if !(Self::MIN_MEMORY_MIB..=Self::MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(SpecError::Memory(self.memory_mib));
        }
        if !self.mac.is_unicast() {
            return Err(SpecError::Mac(self.mac));
        }
        if !is_interface_name(&self.tap) {
            return Err(SpecError::Tap(self.tap.clone()));
        }
        let consumer = *self.consumer.endpoint.ip();
        for (what, address) in [
            ("guest address", self.address),
            ("gateway", self.gateway),
            ("consumer address", consumer),
            ("tunnel address", self.tunnel.address),
            ("tunnel peer", self.tunnel.peer),
        ] {
            if !is_host(address) {
                return Err(SpecError::Address { what, address });
            }
        }
        if self.address == self.gateway || self.address == consumer {
            return Err(SpecError::SameAddress(self.address));
        }
        if self.gateway == consumer {
            return Err(SpecError::SameAddress(consumer));
        }
        if self.tunnel.address == self.tunnel.peer {
            return Err(SpecError::SameAddress(self.tunnel.peer));
        }
        if self.consumer.endpoint.port() == 0 {
            return Err(SpecError::ConsumerPort);
        }
        let unreachable = |endpoint: &&Endpoint| {
            endpoint.address != Address::from(std::net::IpAddr::V4(self.tunnel.peer))
        };
        if let Some(other) = self.reach.iter().find(unreachable) {
            return Err(SpecError::Reach(*other));
        }
        if self.keepalive > Self::MAX_KEEPALIVE {
            return Err(SpecError::Keepalive(self.keepalive.get()));
        }
        if self.tunnel.prefix > 32 {
            return Err(SpecError::TunnelPrefix(self.tunnel.prefix));
        }
        match (self.image.disk(), &self.layer) {
            (None, None) => {}
            (Some(disk), Some(layer)) => layer.check(disk.virtual_bytes)?,
            _ => return Err(SpecError::Disk),
        }
        if self.ssh_key.is_some() && !self.image.disk().is_some_and(|disk| disk.has_seed) {
            return Err(SpecError::SshKey);
        }
        if !self.run_dir.is_absolute() {
            return Err(SpecError::RunDirRelative(self.run_dir.clone()));
        }
        if self.run_dir.as_os_str().as_bytes().len() > Self::MAX_RUN_DIR_BYTES {
            return Err(SpecError::RunDirLong(self.run_dir.clone()));
        }
        Ok(())
    }

    /// Everything that the guest may reach at its tap: its consumer's WireGuard, or what a tunnel of the host's leads to.
    pub fn allowlist(&self) -> Vec<Endpoint> {
        if self.reach.is_empty() {
            vec![self.consumer.allowed_endpoint()]
        } else {
            self.reach.clone()
        }
    }

    /// What the guest is told of itself: one `KEY=VALUE` a line. Every value comes from a type
    /// whose text holds neither space, quote nor newline.
    pub fn guest_config(&self) -> Zeroizing<String> {
        let Self {
            name,
            address,
            gateway,
            consumer,
            tunnel,
            ..
        } = self;
        let console = if self.console_shell { "shell" } else { "log" };
        if !self.reach.is_empty() {
            // It has no part in the tunnel.
            return Zeroizing::new(format!(
                "hostname={name}\n\
                 tunnel=host\n\
                 address={address}\n\
                 gateway={gateway}\n\
                 tunnel_peer={tunnel_peer}\n\
                 console={console}\n",
                tunnel_peer = tunnel.peer,
            ));
        }
        let mut config = Zeroizing::new(String::with_capacity(Self::MAX_CONFIG_BYTES));
        // Writing to a String cannot fail.
        let _ = write!(
            config,
            "hostname={name}\n\
             address={address}\n\
             gateway={gateway}\n\
             consumer_key={key}\n\
             consumer_address={consumer_address}\n\
             consumer_port={consumer_port}\n\
             tunnel_address={tunnel_address}/{prefix}\n\
             tunnel_peer={tunnel_peer}\n\
             console={console}\n",
            key = consumer.public_key,
            consumer_address = consumer.endpoint.ip(),
            consumer_port = consumer.endpoint.port(),
            tunnel_address = tunnel.address,
            prefix = tunnel.prefix,
            tunnel_peer = tunnel.peer,
        );
        // What images take for granted is not said.
        if self.keepalive != Self::KEEPALIVE {
            let _ = writeln!(config, "keepalive={}", self.keepalive);
        }
        if let Some(key) = &self.preshared_key {
            let _ = writeln!(config, "preshared_key={}", *key.base64());
        }
        config
    }

    /// The MAC of the host's side of the tap: derived from the guest's, different from it,
    /// unicast and locally administered. Set explicitly, so that nothing else on the host (udev's
    /// `MACAddressPolicy`) picks another one after the guard has learned it.
    pub fn gateway_mac(&self) -> Mac {
        let Mac([first, rest @ ..]) = self.mac;
        let first = ((first ^ 0x04) | 0x02) & !0x01;
        let [b, c, d, e, f] = rest;
        Mac([first, b, c, d, e, f])
    }
}

fn is_host(address: Ipv4Addr) -> bool {
    !(address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address.is_broadcast()
        || address.octets()[0] == 0
        || address.octets()[0] >= 240)
}

fn is_interface_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        // Names under /proc/sys/net/*/conf that mean every interface.
        && name != "all"
        && name != "default"
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Stored, StoredDisk};
    use omerta_images::qcow2::Layer;

    pub(crate) fn agent() -> AgentTiming {
        AgentTiming {
            arrival: Duration::from_secs(60),
            interval: Duration::from_secs(5),
            deadline: Duration::from_secs(10),
            silence_seconds: 600,
            enforce: true,
        }
    }

    pub(crate) fn spec() -> Spec {
        Spec {
            name: "web-1".parse().unwrap(),
            image: Image {
                kernel: "/img/vmlinuz".into(),
                initrd: "/img/initrd.img".into(),
                stored: None,
                has_agent: false,
                firewall_log: false,
            },
            layer: None,
            ssh_key: None,
            cpus: 1,
            memory_mib: 256,
            mac: "52:54:00:12:34:56".parse().unwrap(),
            address: "10.77.0.2".parse().unwrap(),
            gateway: "10.77.0.1".parse().unwrap(),
            tap: "omweb-1".into(),
            consumer: Consumer {
                public_key: WgPublicKey::try_from([7; 32]).unwrap(),
                endpoint: "192.0.2.10:51820".parse().unwrap(),
            },
            tunnel: Tunnel {
                address: "10.66.0.2".parse().unwrap(),
                prefix: 24,
                peer: "10.66.0.1".parse().unwrap(),
            },
            preshared_key: None,
            keepalive: Spec::KEEPALIVE,
            reach: Vec::new(),
            mode: Mode::Filtered,
            limits: DirectionLimits::default(),
            console_shell: false,
            accel: Accel::Tcg,
            machine: MachineType::Q35,
            run_dir: "/run/omerta/web-1".into(),
            jail: Jail::default(),
            guard_owner: None,
            guard_lease: None,
            redirect: false,
            outlives_launcher: false,
            agent: None,
        }
    }

    pub(crate) fn spec_with_disk() -> Spec {
        let digest = omerta_images::Digest::of(b"");
        let lease = std::fs::File::open("/dev/null").unwrap();
        let mut spec = spec();
        spec.image.stored = Some(Stored {
            kernel: digest,
            initrd: digest,
            disk: Some(StoredDisk {
                path: "/img/disk".into(),
                sha256: digest,
                bytes: 1 << 20,
                format: omerta_images::DiskFormat::Raw,
                virtual_bytes: 1 << 20,
                root: "vda1".parse().unwrap(),
                has_seed: true,
            }),
            lease: omerta_images::Lease::of(lease),
        });
        spec.layer = Some(LayerSpec {
            directory: "/disks".into(),
            layer: Layer::new(1 << 30).unwrap(),
        });
        spec
    }

    #[test]
    fn a_disk_is_as_large_as_the_images_and_there_when_the_images_is() {
        let mut with = spec_with_disk();
        with.ssh_key = Some(crate::ssh_public_key::tests::KEY.parse().unwrap());
        with.validate().unwrap();
        with.layer.as_mut().unwrap().layer = Layer::new(1 << 19).unwrap();
        assert!(matches!(with.validate(), Err(SpecError::DiskSmall { .. })));
        with.layer = None;
        assert_eq!(with.validate(), Err(SpecError::Disk));
        let mut without = spec();
        without.layer = spec_with_disk().layer;
        assert_eq!(without.validate(), Err(SpecError::Disk));
        without.layer = None;
        without.ssh_key = with.ssh_key;
        assert_eq!(without.validate(), Err(SpecError::SshKey));
    }

    fn refusal(change: impl FnOnce(&mut Spec)) -> SpecError {
        let mut changed = spec();
        change(&mut changed);
        changed.validate().unwrap_err()
    }

    #[test]
    fn a_sound_spec_is_taken() {
        spec().validate().unwrap();
    }

    #[test]
    fn each_unsound_field_is_refused_with_its_cause() {
        use SpecError as E;
        assert_eq!(refusal(|s| s.cpus = 0), E::Cpus(0));
        assert_eq!(refusal(|s| s.cpus = 65), E::Cpus(65));
        assert_eq!(refusal(|s| s.memory_mib = 63), E::Memory(63));
        assert!(matches!(refusal(|s| s.mac = Mac::BROADCAST), E::Mac(_)));
        assert!(matches!(refusal(|s| s.mac = Mac([0; 6])), E::Mac(_)));
        for tap in [
            "",
            "all",
            "default",
            "a/b",
            "a,b",
            "a b",
            "..",
            "1tap",
            "abcdefghijklmnop",
            "a%d",
        ] {
            assert_eq!(refusal(|s| s.tap = tap.into()), E::Tap(tap.into()));
        }
        for address in [
            "0.0.0.0",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "0.1.2.3",
            "250.1.1.1",
        ] {
            assert!(matches!(
                refusal(|s| s.address = address.parse().unwrap()),
                E::Address {
                    what: "guest address",
                    ..
                }
            ));
        }
        assert!(matches!(
            refusal(|s| s.gateway = s.address),
            E::SameAddress(_)
        ));
        assert!(matches!(
            refusal(|s| s.consumer.endpoint = SocketAddrV4::new(s.gateway, 1)),
            E::SameAddress(_)
        ));
        assert!(matches!(
            refusal(|s| s.consumer.endpoint = SocketAddrV4::new(s.address, 1)),
            E::SameAddress(_)
        ));
        assert!(matches!(
            refusal(|s| s.tunnel.peer = s.tunnel.address),
            E::SameAddress(_)
        ));
        assert_eq!(
            refusal(|s| s.consumer.endpoint.set_port(0)),
            E::ConsumerPort
        );
        assert_eq!(refusal(|s| s.tunnel.prefix = 33), E::TunnelPrefix(33));
        assert!(matches!(
            refusal(|s| s.run_dir = "run/x".into()),
            E::RunDirRelative(_)
        ));
        assert!(matches!(
            refusal(|s| s.run_dir = format!("/{}", "x".repeat(90)).into()),
            E::RunDirLong(_)
        ));
    }

    #[test]
    fn the_guest_is_told_the_facts_and_no_more() {
        assert_eq!(
            *spec().guest_config(),
            "hostname=web-1\naddress=10.77.0.2\ngateway=10.77.0.1\n\
             consumer_key=BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\n\
             consumer_address=192.0.2.10\nconsumer_port=51820\n\
             tunnel_address=10.66.0.2/24\ntunnel_peer=10.66.0.1\nconsole=log\n"
        );
        let mut with = spec();
        with.preshared_key = Some(Secret::from([7; 32]));
        with.keepalive = NonZero::new(7).unwrap();
        assert_eq!(
            *with.guest_config(),
            format!(
                "{}keepalive=7\npreshared_key=BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\n",
                *spec().guest_config()
            )
        );
        with.preshared_key = Some(Secret::from([8; 32]));
        assert!(!format!("{with:?}").contains("CAgI"), "a log would tell it");
        with.keepalive = NonZero::new(121).unwrap();
        assert_eq!(with.validate(), Err(SpecError::Keepalive(121)));
    }

    #[test]
    fn a_guest_of_a_tunnel_that_the_host_keeps_is_told_no_endpoint_and_reaches_none() {
        let mut spec = spec();
        assert_eq!(spec.allowlist(), [spec.consumer.allowed_endpoint()]);
        spec.address = "10.66.0.2".parse().unwrap();
        spec.reach = vec!["tcp:10.66.0.1:80".parse().unwrap()];
        spec.validate().unwrap();
        assert_eq!(spec.allowlist(), spec.reach);
        assert_eq!(
            *spec.guest_config(),
            "hostname=web-1\ntunnel=host\naddress=10.66.0.2\ngateway=10.77.0.1\n\
             tunnel_peer=10.66.0.1\nconsole=log\n"
        );
        let outside: Endpoint = "tcp:192.0.2.10:80".parse().unwrap();
        spec.reach.push(outside);
        assert_eq!(spec.validate(), Err(SpecError::Reach(outside)));
    }

    #[test]
    fn the_gateway_mac_differs_and_is_one_local_interface() {
        for first in 0..=255u8 {
            let mut with = spec();
            with.mac = Mac([first, 1, 2, 3, 4, 5]);
            let gateway = with.gateway_mac();
            assert!(gateway.is_unicast() && gateway.0[0] & 0x02 != 0);
            assert_ne!(gateway, with.mac);
        }
    }
}
