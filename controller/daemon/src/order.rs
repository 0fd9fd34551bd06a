//! A request for a guest, checked.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::net::Ipv4Addr;
use std::num::NonZero;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use omerta_api::{ApiError, ErrorKind, RunRequest};
use omerta_dataplane::{DirectionLimits, OwnerParseError};
use omerta_engine::OnViolation;
use omerta_images::qcow2::Layer;
use omerta_tunnel::Secret;
use omerta_verdict::{Endpoint, Mode};
use omerta_vm_launcher::{
    AgentTiming, Consumer, GuestName, Image, Jail, LayerSpec, PathError, Spec, SshPublicKey, Tunnel,
};

use crate::acceleration::Platform;
use crate::config::Settings;
use crate::failure::{failed, usage};
use crate::host_memory::HostMemory;
use crate::names::PeerName;
use crate::order_words::{
    HOST, checked_labels, checked_ssh_key, checked_timeout, consumer_text, direction_limits,
    guest_limits, is_host_tunnel, parse_consumer, parse_keepalive, parse_name, parse_preshared_key,
    parse_reach, parse_tunnel, reach_text,
};
use crate::pool::Addresses;
use crate::room::Share;
use crate::sweep::OWNER;
use crate::tap_name::tap_name;

const DEFAULT_CPUS: u8 = 1;
const DEFAULT_MEMORY_MIB: u32 = 256;

/// What is to be run, without what the daemon itself assigns.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) name: GuestName,
    pub(crate) image_name: String,
    pub(crate) on_violation: OnViolation,
    /// What its consumer is known by, if by name.
    pub(crate) consumer_name: Option<PeerName>,
    /// Whether an interface has the name of its tap, as its own guest's does while it lives.
    pub(crate) tap_exists: bool,
    image: Image,
    layer: Option<LayerSpec>,
    ssh_key: Option<SshPublicKey>,
    ssh_key_text: Option<String>,
    disk_mib: Option<u32>,
    consumer: Consumer,
    tunnel: Tunnel,
    /// In no row of the store: who takes over the guest has no use for it.
    preshared_key: Option<Secret>,
    keepalive: NonZero<u16>,
    /// What it reaches in a tunnel that omertad keeps; empty for a tunnel of its own.
    reach: Vec<Endpoint>,
    mode: Mode,
    limits: DirectionLimits,
    cpus: u8,
    memory_mib: u32,
    console_shell: bool,
    agent: bool,
    agent_timing: AgentTiming,
    timeout_seconds: Option<NonZero<u32>>,
    labels: BTreeMap<String, String>,
    memory: Option<HostMemory>,
    jail: Jail,
    guard_lease: Option<Duration>,
    redirect: bool,
}

impl Order {
    /// Checks a request against what this daemon and this host have. Blocks for as long as the
    /// image's file system does.
    pub(crate) fn check(request: RunRequest, settings: &Settings) -> Result<Self, ApiError> {
        // The name first: an image is looked for only for what can be a guest.
        parse_name(&request.name)?;
        let consumer = parse_consumer(&request.consumer)?;
        refuse_forbidden(*consumer.endpoint.ip(), settings)?;
        let asked = request.agent;
        if asked == Some(true) && is_host_tunnel(&request) {
            return Err(usage(
                "agent is true and the tunnel is the host's: the agent answers for a tunnel of the guest's, so leave it out".into(),
            ));
        }
        let host_tunnel = is_host_tunnel(&request);
        let checked = Self::of(request, settings)?;
        let image = settings.images.open(&checked.image_name)?;
        if asked == Some(true) && !image.has_agent {
            return Err(usage(format!(
                "agent is true and image `{}` has none: leave it out, or import the image with --agent",
                checked.image_name
            )));
        }
        let agent = asked.unwrap_or(settings.agent.is_asked) && image.has_agent && !host_tunnel;
        let layer = checked_layer(&image, checked.disk_mib, &settings.disk_dir)?;
        let disk_mib = layer
            .as_ref()
            .map(|layer| u32::try_from(layer.layer.virtual_bytes() >> 20).unwrap_or(u32::MAX));
        Ok(Self {
            image,
            layer,
            disk_mib,
            ssh_key: checked_ssh_key(checked.ssh_key_text.as_deref())?,
            agent,
            ..checked
        })
    }

    /// A request that was checked before its guest ran, which has its image already.
    pub(crate) fn of_a_running_guest(
        request: RunRequest,
        settings: &Settings,
    ) -> Result<Self, ApiError> {
        Self::of(request, settings)
    }

    /// The same, of a consumer that is known by name.
    pub(crate) fn of_consumer(self, consumer_name: Option<PeerName>) -> Self {
        Self {
            consumer_name,
            ..self
        }
    }

    /// The request, with what was not said filled in: it means the same whatever defaults come to be.
    pub(crate) fn request(&self) -> RunRequest {
        RunRequest {
            name: self.name.to_string(),
            image: self.image_name.clone(),
            consumer: consumer_text(&self.consumer),
            tunnel_address: Some(format!("{}/{}", self.tunnel.address, self.tunnel.prefix)),
            tunnel_peer: Some(self.tunnel.peer),
            preshared_key: None,
            keepalive_seconds: Some(self.keepalive.get()),
            tunnel: self.has_host_tunnel().then(|| HOST.to_owned()),
            reach: self.reach.iter().map(reach_text).collect(),
            cpus: Some(self.cpus),
            memory_mib: Some(self.memory_mib),
            mode: Some(self.mode.word().to_owned()),
            on_violation: Some(self.on_violation),
            limits: Some(guest_limits(self.limits)),
            console_shell: self.console_shell,
            agent: Some(self.agent),
            disk_mib: self.disk_mib,
            ssh_key: self.ssh_key_text.clone(),
            timeout_seconds: self.timeout_seconds(),
            labels: self.labels.clone(),
        }
    }

    fn of(request: RunRequest, settings: &Settings) -> Result<Self, ApiError> {
        let name = parse_name(&request.name)?;
        let consumer = parse_consumer(&request.consumer)?;
        let tunnel = parse_tunnel(request.tunnel_address.as_deref(), request.tunnel_peer)?;
        let reach = parse_reach(request.tunnel.as_deref(), &request.reach, tunnel.peer)?;
        let mode = match request.mode {
            Some(word) => word.parse().map_err(|_| {
                let word = word.escape_default();
                usage(format!(
                    "mode `{word}` is not one: write filtered, conntrack, sampled or direct"
                ))
            })?,
            None => Mode::default(),
        };
        Ok(Self {
            // To ask for an interface that is not there may have the kernel look for a module.
            tap_exists: nix::net::if_::if_nametoindex(tap_name(name.as_str()).as_str()).is_ok(),
            name,
            image_name: request.image,
            on_violation: request.on_violation.unwrap_or(settings.on_violation),
            consumer_name: None,
            // A guest that runs has its image, its disk and its key.
            layer: None,
            disk_mib: request.disk_mib,
            ssh_key: None,
            ssh_key_text: request.ssh_key,
            image: Image::of_a_running_guest(),
            consumer,
            tunnel,
            preshared_key: parse_preshared_key(request.preshared_key.as_ref())?,
            keepalive: parse_keepalive(request.keepalive_seconds)?,
            reach,
            mode,
            limits: direction_limits(request.limits.unwrap_or(settings.limits)),
            cpus: request.cpus.unwrap_or(DEFAULT_CPUS),
            memory_mib: request.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
            console_shell: request.console_shell,
            // A guest that runs has a port for it or has not.
            agent: request.agent.unwrap_or(false),
            agent_timing: settings.agent.timing,
            timeout_seconds: checked_timeout(request.timeout_seconds)?,
            labels: checked_labels(request.labels)?,
            memory: HostMemory::now(),
            jail: settings.jail.clone(),
            guard_lease: settings.lease,
            redirect: settings.redirect,
        })
    }

    /// Whether omertad keeps its tunnel.
    pub(crate) const fn has_host_tunnel(&self) -> bool {
        !self.reach.is_empty()
    }

    /// What it is to boot.
    pub(crate) const fn image(&self) -> &Image {
        &self.image
    }

    /// Whether its guest has a disk of its own.
    pub(crate) const fn has_disk(&self) -> bool {
        self.disk_mib.is_some()
    }

    /// What it takes of the host.
    pub(crate) fn share(&self) -> Share {
        Share {
            guests: 1,
            vcpus: self.cpus.into(),
            memory_mib: self.memory_mib.into(),
        }
    }

    /// The host's memory when the order was checked.
    pub(crate) const fn memory(&self) -> Option<HostMemory> {
        self.memory
    }

    /// Seconds that it may run.
    pub(crate) fn timeout_seconds(&self) -> Option<u32> {
        self.timeout_seconds.map(NonZero::get)
    }

    /// How long it may run.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.timeout_seconds
            .map(|seconds| Duration::from_secs(seconds.get().into()))
    }

    /// What the operator calls it by.
    pub(crate) const fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    /// The launcher's spec, with what the daemon assigns.
    pub(crate) fn spec(
        &self,
        addresses: Addresses,
        tap: String,
        platform: Platform,
        run_dir: &Path,
    ) -> Result<Spec, ApiError> {
        let spec = Spec {
            name: self.name.clone(),
            image: self.image.clone(),
            layer: self.layer.clone(),
            ssh_key: self.ssh_key.clone(),
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            mac: addresses.mac,
            // In a namespace of its own it has the address that its consumer knows it by.
            address: if self.has_host_tunnel() {
                self.tunnel.address
            } else {
                addresses.guest
            },
            gateway: addresses.gateway,
            tap,
            consumer: self.consumer,
            tunnel: self.tunnel,
            preshared_key: self.preshared_key.clone(),
            keepalive: self.keepalive,
            reach: self.reach.clone(),
            mode: self.mode,
            limits: self.limits,
            console_shell: self.console_shell,
            accel: platform.accel,
            machine: platform.machine,
            run_dir: run_dir.join(self.name.as_str()),
            jail: self.jail.clone(),
            guard_owner: Some(
                OWNER
                    .parse()
                    .map_err(|error: OwnerParseError| failed(&error))?,
            ),
            guard_lease: self.guard_lease,
            // The host's end of a tunnel has no next hop.
            redirect: self.redirect && !self.has_host_tunnel(),
            outlives_launcher: !self.has_host_tunnel(),
            agent: self.agent.then_some(AgentTiming {
                // Under a policy that lets a guest run on, its agent does too.
                enforce: self.agent_timing.enforce
                    && matches!(
                        self.on_violation,
                        OnViolation::Pause | OnViolation::Terminate
                    ),
                ..self.agent_timing
            }),
        };
        spec.validate().map_err(|error| usage(format!("{error}")))?;
        Ok(spec)
    }
}

/// The guest's own disk above the image's. Makes the directory for it.
fn checked_layer(
    image: &Image,
    disk_mib: Option<u32>,
    directory: &Path,
) -> Result<Option<LayerSpec>, ApiError> {
    let bytes = match (image.disk(), disk_mib) {
        (None, None) => return Ok(None),
        (None, Some(_)) => {
            return Err(usage(
                "disk_mib is given and the image has no disk: leave it out".into(),
            ));
        }
        (Some(disk), None) => disk.virtual_bytes,
        (Some(_), Some(mib)) => u64::from(mib) << 20,
    };
    let layer = Layer::new(bytes)
        .ok_or_else(|| usage("disk_mib: give 1 to 1048576, which is 1 TiB".into()))?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(PathError::of("create", directory))
        .map_err(|error| failed(&error))?;
    Ok(Some(LayerSpec {
        directory: directory.to_owned(),
        layer,
    }))
}

/// Refuses an address where no consumer can be.
pub(crate) fn refuse_forbidden(address: Ipv4Addr, settings: &Settings) -> Result<(), ApiError> {
    if settings.guest_pool.contains(address) {
        return Err(usage(format!(
            "consumer address {address} lies in the guests' own network: give the consumer's real address"
        )));
    }
    if address.is_loopback() || address.is_link_local() {
        return Err(usage(format!(
            "consumer address {address} means another host to each that uses it: give the consumer's real address"
        )));
    }
    Ok(())
}

/// Whether an error is about what was asked for and not about this host.
pub(crate) fn kind_of(error: &omerta_vm_launcher::LaunchError) -> ErrorKind {
    use omerta_dataplane::ErrorKind as Kind;
    match error.kind() {
        Kind::NotFound => ErrorKind::NotFound,
        Kind::Usage => ErrorKind::Usage,
        Kind::Refused => ErrorKind::Refused,
        Kind::Failed => ErrorKind::Failed,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use omerta_vm_launcher::{Accel, MachineType};

    use super::*;
    use crate::config::Config;

    const KEY: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";

    pub(crate) fn request() -> RunRequest {
        RunRequest {
            name: "alpha".into(),
            image: "default".into(),
            consumer: format!("{KEY}@192.0.2.10:51820"),
            tunnel_address: None,
            tunnel_peer: None,
            preshared_key: None,
            keepalive_seconds: None,
            tunnel: None,
            reach: Vec::new(),
            cpus: None,
            memory_mib: None,
            disk_mib: None,
            ssh_key: None,
            mode: None,
            on_violation: None,
            limits: None,
            console_shell: false,
            agent: None,
            timeout_seconds: None,
            labels: BTreeMap::new(),
        }
    }

    fn settings(image_dir: &Path) -> Settings {
        let config = Config {
            image_dir: Some(image_dir.to_owned()),
            ..Config::default()
        };
        config.validate().unwrap()
    }

    fn image_dir() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("default");
        std::fs::create_dir(&image).unwrap();
        std::fs::write(image.join("vmlinuz"), b"kernel").unwrap();
        std::fs::write(image.join("initrd.img"), b"initrd").unwrap();
        directory
    }

    #[test]
    fn sound_request_becomes_a_spec_with_the_defaults() {
        let images = image_dir();
        let settings = settings(images.path());
        let order = Order::check(request(), &settings).unwrap();
        assert_eq!(order.on_violation, OnViolation::Terminate);
        let (_, addresses) = crate::pool::Slots::new(settings.guest_pool).take().unwrap();
        let spec = order
            .spec(
                addresses,
                "omalpha".into(),
                Platform {
                    accel: Accel::Tcg,
                    machine: MachineType::Q35,
                },
                Path::new("/run/omerta"),
            )
            .unwrap();
        assert_eq!(
            (spec.cpus, spec.memory_mib, spec.mode),
            (1, 256, Mode::Filtered)
        );
        assert_eq!(spec.run_dir, Path::new("/run/omerta/alpha"));
        assert_eq!(consumer_text(&spec.consumer), request().consumer);
    }

    #[test]
    fn each_unsound_field_is_refused_by_name() {
        let images = image_dir();
        let settings = settings(images.path());
        let refusal = |change: &dyn Fn(&mut RunRequest)| {
            let mut changed = request();
            change(&mut changed);
            Order::check(changed, &settings).unwrap_err()
        };
        type Change = dyn Fn(&mut RunRequest);
        let cases: [(&Change, &str); 13] = [
            (&|r| r.keepalive_seconds = Some(0), "keepalive_seconds is 0"),
            (
                &|r| r.preshared_key = Some(KEY[1..].to_owned().into()),
                "preshared_key is no key",
            ),
            (&|r| r.disk_mib = Some(1), "the image has no disk"),
            (
                &|r| r.ssh_key = Some("ssh-dss x".into()),
                "no SSH public key",
            ),
            (&|r| r.name = "Alpha".into(), "`Alpha` is not a guest name"),
            (
                &|r| r.image = "../etc".into(),
                "`../etc` is not an image name",
            ),
            (&|r| r.image = "a/b".into(), "`a/b` is not an image name"),
            (&|r| r.consumer = "nobody".into(), "PUBLIC_KEY@ADDRESS:PORT"),
            (
                &|r| r.consumer = "AAAA@192.0.2.10:1".into(),
                "WireGuard public key",
            ),
            (
                &|r| r.consumer = format!("{KEY}@consumer.example:1"),
                "IPv4 endpoint",
            ),
            (
                &|r| r.consumer = format!("{KEY}@10.77.0.9:1"),
                "10.77.0.9 lies in the guests'",
            ),
            (
                &|r| r.tunnel_address = Some("10.66.0.2".into()),
                "tunnel address `10.66.0.2`",
            ),
            (&|r| r.mode = Some("open".into()), "mode `open`"),
        ];
        for (change, names) in cases {
            let error = refusal(change);
            assert_eq!(error.error, ErrorKind::Usage, "{}", error.message);
            assert!(error.message.contains(names), "{}", error.message);
            assert_eq!(error.message.lines().count(), 1);
        }
    }

    #[test]
    fn missing_image_is_not_found_and_the_remedy_named() {
        let images = image_dir();
        let mut absent = request();
        absent.image = "absent".into();
        let error = Order::check(absent, &settings(images.path())).unwrap_err();
        assert_eq!(error.error, ErrorKind::NotFound);
        assert!(error.message.contains("no image `absent`"));
        assert!(error.message.contains("omerta image list"));
    }
}
