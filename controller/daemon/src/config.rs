//! The configuration: as written ([`Config`]) and as checked ([`Settings`]).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use omerta_api::GuestLimits;
use omerta_dataplane::{LeaseTime, LeaseTimeError, UplinkHook};
use omerta_engine::{OnSilence, OnViolation, Threshold, ThresholdError, Thresholds};
use omerta_images::Store;
use omerta_incidents::Bounds;
use omerta_tunnel::Silence;
use omerta_verdict::{Direction, Reason};
use omerta_vm_launcher::{
    Accel, AgentTiming, Jail, MachineType, MachineTypeError, PartError, UidRange, UidRangeError,
};
use serde::Deserialize;
use thiserror::Error;

use crate::host_tunnel::{FIRST_USER, LAST_USER};
use crate::images::Images;
use crate::names::NameSettings;
use crate::pool::{GuestPool, PoolError};
use crate::tunnel_health::TunnelSettings;

/// A week: more is no deadline.
const MOST_AGENT_SECONDS: u32 = 604_800;

/// The configuration file's content. A key that is not one of these is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) socket: Option<PathBuf>,
    pub(crate) state_dir: Option<PathBuf>,
    pub(crate) run_dir: Option<PathBuf>,
    pub(crate) image_dir: Option<PathBuf>,
    pub(crate) metrics: Option<String>,
    pub(crate) guest_pool: Option<String>,
    pub(crate) uplinks: Option<Vec<String>>,
    pub(crate) uplink_hook: Option<String>,
    pub(crate) redirect: Option<bool>,
    pub(crate) on_violation: Option<String>,
    pub(crate) accel: Option<String>,
    pub(crate) machine: Option<String>,
    pub(crate) max_guests: Option<usize>,
    pub(crate) max_vcpus: Option<u64>,
    pub(crate) memory_reserve_mib: Option<u64>,
    pub(crate) limits: Option<GuestLimits>,
    pub(crate) jail: Option<JailConfig>,
    pub(crate) images: Option<ImagesConfig>,
    pub(crate) recovery: Option<RecoveryConfig>,
    pub(crate) tunnel: Option<TunnelConfig>,
    pub(crate) names: Option<NamesConfig>,
    pub(crate) agent: Option<AgentConfig>,
    pub(crate) rogue: Option<RogueConfig>,
    pub(crate) incidents: Option<IncidentsConfig>,
}

/// What may be said of rogue frames.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RogueConfig {
    #[serde(default)]
    thresholds: BTreeMap<String, ThresholdConfig>,
}

/// When frames of one reason act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ThresholdConfig {
    frames: u32,
    seconds: u32,
}

/// What may be said of the record of incidents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct IncidentsConfig {
    keep_mib: Option<u64>,
}

/// The least seconds in which a tunnel may be said to be silent.
const SHORTEST_SILENCE: u32 = 150;
/// Shorter, and a host that is busy would cut off guests whose omertad is there.
const SHORTEST_LEASE: Duration = Duration::from_secs(10);

/// What may be said of guests whose omertad goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecoveryConfig {
    on_stop: Option<OnStop>,
    lease: Option<String>,
}

/// What may be said of consumers by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamesConfig {
    #[serde(default)]
    nameservers: Vec<String>,
    least_seconds: Option<u32>,
    most_seconds: Option<u32>,
    #[serde(default)]
    forbid: Vec<String>,
    #[serde(default)]
    allow: Vec<String>,
}

/// What may be said of the agents in guests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AgentConfig {
    ask: Option<bool>,
    arrival_seconds: Option<u32>,
    interval_seconds: Option<u32>,
    deadline_seconds: Option<u32>,
    silence_seconds: Option<u32>,
    enforce: Option<bool>,
}

/// When agents are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AgentSettings {
    /// Whether those of guests that do not say are.
    pub(crate) is_asked: bool,
    pub(crate) timing: AgentTiming,
}

/// What may be said of guests' tunnels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TunnelConfig {
    #[serde(default)]
    answer_seconds: u32,
    #[serde(default)]
    silent_seconds: u32,
    #[serde(default)]
    on_silence: OnSilence,
}

/// What becomes of guests when omertad is told to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OnStop {
    /// They end.
    #[default]
    End,
    /// They run on, and the next omertad takes them over.
    Keep,
}

/// What may be said of the store of images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImagesConfig {
    store: Option<PathBuf>,
    trusted_keys: Option<PathBuf>,
    require_signature: Option<bool>,
}

/// What may be said of the jails around guests' QEMUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JailConfig {
    uids: Option<String>,
    #[serde(default)]
    paths: Vec<PathBuf>,
    #[serde(default)]
    without: Vec<String>,
}

/// The configuration, checked.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Where the API listens.
    pub(crate) socket: PathBuf,
    /// Where guests' run directories are made.
    pub(crate) run_dir: PathBuf,
    /// Where images are found.
    pub(crate) images: Images,
    /// Where guests' own disks are made.
    pub(crate) disk_dir: PathBuf,
    /// Where metrics are served, if they are.
    pub(crate) metrics: Option<SocketAddr>,
    /// Where guests' addresses come from.
    pub(crate) guest_pool: GuestPool,
    /// Interfaces at which is dropped early what is for none of a guest's endpoints.
    pub(crate) uplinks: Vec<String>,
    /// Where in them.
    pub(crate) uplink_hook: UplinkHook,
    /// Whether what guards allow passes the host's stack by.
    pub(crate) redirect: bool,
    /// What rogue traffic does to a guest that does not say.
    pub(crate) on_violation: OnViolation,
    /// How guests execute; probed when absent.
    pub(crate) accel: Option<Accel>,
    /// On which machine; probed when absent.
    pub(crate) machine: Option<MachineType>,
    /// Where what outlives a restart is kept.
    pub(crate) state_dir: PathBuf,
    /// How many guests may live at once.
    pub(crate) max_guests: usize,
    /// How many virtual CPUs living guests may have together.
    pub(crate) max_vcpus: u64,
    /// Memory that guests are never given, in MiB.
    pub(crate) memory_reserve_mib: u64,
    /// How much may pass to and from a guest that does not say.
    pub(crate) limits: GuestLimits,
    /// What holds each guest's QEMU.
    pub(crate) jail: Jail,
    /// When the agents in guests are asked.
    pub(crate) agent: AgentSettings,
    /// What is expected of guests' tunnels.
    pub(crate) tunnel: TunnelSettings,
    /// How consumers are followed by name.
    pub(crate) names: NameSettings,
    /// What becomes of guests when omertad is told to stop.
    pub(crate) on_stop: OnStop,
    /// How long guests' guards let anything pass when omertad is not there; `None` is for ever.
    pub(crate) lease: Option<Duration>,
    /// How many rogue frames act.
    pub(crate) thresholds: Thresholds,
    /// How much is kept of the record of incidents.
    pub(crate) incidents: Bounds,
}

/// Why there is no usable configuration.
#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("configuration file {}: {problem}", path.display())]
    Parse { path: PathBuf, problem: String },
    #[error("metrics address `{0}` is not one: write ADDR:PORT as in 127.0.0.1:9469, or off")]
    Metrics(String),
    #[error("guest pool")]
    Pool(#[from] PoolError),
    #[error("on_violation")]
    OnViolation(#[from] omerta_engine::OnViolationParseError),
    #[error("accel `{0}` is not one: write auto, kvm or tcg")]
    Accel(String),
    #[error("uplink_hook `{0}` is not one: write tcx or xdp")]
    UplinkHook(String),
    #[error(transparent)]
    Machine(#[from] MachineTypeError),
    #[error("[jail] uids")]
    Uids(#[from] UidRangeError),
    #[error(
        "[jail] uids: `{0}` has users of the tunnels that the host keeps, {first} to {last}: give others",
        first = FIRST_USER, last = LAST_USER
    )]
    TunnelUids(UidRange),
    #[error("[jail] without")]
    Without(#[from] PartError),
    #[error("[jail] paths: {} is not absolute, or leads through `..`", .0.display())]
    JailPath(PathBuf),
    #[error("[recovery] lease `{text}`", text = .0.escape_default())]
    Lease(String, #[source] LeaseTimeError),
    #[error(
        "[recovery] lease is {} s: give {} s or more, for guards are looked at and their leases renewed each second, and a busy host may be late", .0.as_secs(), SHORTEST_LEASE.as_secs()
    )]
    LeaseShort(Duration),
    #[error("[agent] {what} is {given}: give {least} to {MOST_AGENT_SECONDS}")]
    AgentSeconds {
        what: &'static str,
        given: u32,
        least: u32,
    },
    #[error(
        "[tunnel] {what} is {given}: give {SHORTEST_SILENCE} or more, for a tunnel that is up may bring one frame in two minutes, or 0 for never"
    )]
    SilenceSeconds { what: &'static str, given: u32 },
    #[error("[names] nameserver `{}` is none: write ADDRESS or ADDRESS:PORT", .0.escape_default())]
    Nameserver(String),
    #[error("[names] `{}` is no network: write ADDRESS/PREFIX as in 10.0.0.0/8", .0.escape_default())]
    Network(String),
    #[error(
        "[names] least_seconds is {least} and most_seconds {most}: give 1 to {MOST_AGENT_SECONDS}, and no more for the least than for the most"
    )]
    NameSeconds { least: u32, most: u32 },
    #[error("max_guests is {given}: give 1 to {pool}, as many as the guest pool has room for")]
    MaxGuests { given: usize, pool: usize },
    #[error("[rogue.thresholds] {reason}")]
    Threshold {
        reason: String,
        #[source]
        source: ThresholdError,
    },
    #[error(
        "[rogue.thresholds] `{0}` is no reason that is held against a guest: `omerta guard reasons` lists all"
    )]
    ThresholdReason(String),
    #[error("[incidents] keep_mib is {0}: give 1 to 65536")]
    KeepMib(u64),
    #[error("{what} {} cannot be made an absolute path", path.display())]
    Path {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Config {
    /// Reads a configuration file.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(&text, span.start));
            let problem = format!("line {line}: {}", error.message().replace('\n', " "));
            ConfigError::Parse {
                path: path.to_owned(),
                problem,
            }
        })
    }

    /// Fills in what is not said and checks what is.
    pub(crate) fn validate(self) -> Result<Settings, ConfigError> {
        let state_dir = self.state_dir.unwrap_or_else(|| "/var/lib/omerta".into());
        let images = self.images.unwrap_or_default();
        let store = images.store.unwrap_or_else(|| state_dir.join("images"));
        let trusted_keys = images
            .trusted_keys
            .unwrap_or_else(|| "/etc/omerta/trusted-keys".into());
        let image_dir = self.image_dir.map(|path| absolute("image directory", path));
        let run_dir = self.run_dir.unwrap_or_else(|| "/run/omerta".into());
        let socket = self.socket.unwrap_or_else(|| run_dir.join("omertad.sock"));
        let metrics = match self.metrics.as_deref().unwrap_or("127.0.0.1:9469") {
            "off" => None,
            text => Some(
                text.parse()
                    .map_err(|_| ConfigError::Metrics(text.to_owned()))?,
            ),
        };
        let guest_pool: GuestPool = self
            .guest_pool
            .as_deref()
            .unwrap_or("10.77.0.0/16")
            .parse()?;
        let on_violation = match self.on_violation {
            Some(word) => word.parse()?,
            None => OnViolation::Terminate,
        };
        let accel = match self.accel.as_deref() {
            None | Some("auto") => None,
            Some("kvm") => Some(Accel::Kvm),
            Some("tcg") => Some(Accel::Tcg),
            Some(other) => return Err(ConfigError::Accel(other.to_owned())),
        };
        let machine = match self.machine.as_deref() {
            None | Some("auto") => None,
            Some(word) => Some(word.parse()?),
        };
        let uplink_hook = match self.uplink_hook.as_deref() {
            None | Some("tcx") => UplinkHook::Tcx,
            Some("xdp") => UplinkHook::Xdp,
            Some(other) => return Err(ConfigError::UplinkHook(other.to_owned())),
        };
        let recovery = self.recovery.unwrap_or_default();
        let pool = guest_pool.capacity();
        let max_guests = self.max_guests.unwrap_or(pool.min(256));
        if !(1..=pool).contains(&max_guests) {
            return Err(ConfigError::MaxGuests {
                given: max_guests,
                pool,
            });
        }
        Ok(Settings {
            socket: absolute("socket", socket)?,
            run_dir: absolute("run directory", run_dir)?,
            disk_dir: absolute("state directory", state_dir.join("disks"))?,
            images: Images {
                directory: image_dir.transpose()?,
                store: Store::at(absolute("image store", store)?),
                trusted_keys: absolute("directory of trusted keys", trusted_keys)?,
                require_signature: images.require_signature.unwrap_or(true),
            },
            metrics,
            guest_pool,
            uplinks: self.uplinks.unwrap_or_default(),
            uplink_hook,
            redirect: self.redirect.unwrap_or(false),
            on_violation,
            accel,
            machine,
            state_dir: absolute("state directory", state_dir)?,
            max_guests,
            max_vcpus: self.max_vcpus.unwrap_or_else(default_vcpus),
            memory_reserve_mib: self.memory_reserve_mib.unwrap_or(512),
            limits: self.limits.unwrap_or_default(),
            jail: self.jail.unwrap_or_default().validate()?,
            lease: recovery.checked_lease()?,
            tunnel: self.tunnel.unwrap_or_default().validate()?,
            names: self.names.unwrap_or_default().validate()?,
            agent: self.agent.unwrap_or_default().validate()?,
            on_stop: recovery.on_stop.unwrap_or_default(),
            thresholds: self.rogue.unwrap_or_default().validate()?,
            incidents: self.incidents.unwrap_or_default().validate()?,
        })
    }
}

impl RecoveryConfig {
    fn checked_lease(&self) -> Result<Option<Duration>, ConfigError> {
        let Some(text) = &self.lease else {
            return Ok(None);
        };
        let lease: LeaseTime = text
            .parse()
            .map_err(|error| ConfigError::Lease(text.clone(), error))?;
        match lease.0 {
            Some(short) if short < SHORTEST_LEASE => Err(ConfigError::LeaseShort(short)),
            lease => Ok(lease),
        }
    }
}

impl AgentConfig {
    fn validate(self) -> Result<AgentSettings, ConfigError> {
        let seconds = |what, given: Option<u32>, default, least| {
            let given = given.unwrap_or(default);
            if (least..=MOST_AGENT_SECONDS).contains(&given) {
                Ok(given)
            } else {
                Err(ConfigError::AgentSeconds { what, given, least })
            }
        };
        let time = |what, given, default| {
            seconds(what, given, default, 1).map(|seconds| Duration::from_secs(seconds.into()))
        };
        let timing = AgentTiming {
            arrival: time("arrival_seconds", self.arrival_seconds, 300)?,
            interval: time("interval_seconds", self.interval_seconds, 5)?,
            deadline: time("deadline_seconds", self.deadline_seconds, 30)?,
            silence_seconds: seconds("silence_seconds", self.silence_seconds, 3600, 0)?,
            enforce: self.enforce.unwrap_or(true),
        };
        Ok(AgentSettings {
            is_asked: self.ask.unwrap_or(true),
            timing,
        })
    }
}

impl TunnelConfig {
    fn validate(self) -> Result<TunnelSettings, ConfigError> {
        let seconds = |given: u32| (given > 0).then(|| Duration::from_secs(given.into()));
        if (1..SHORTEST_SILENCE).contains(&self.silent_seconds) {
            return Err(ConfigError::SilenceSeconds {
                what: "silent_seconds",
                given: self.silent_seconds,
            });
        }
        Ok(TunnelSettings {
            silence: Silence {
                first: seconds(self.answer_seconds),
                later: seconds(self.silent_seconds),
            },
            on_silence: self.on_silence,
        })
    }
}

impl NamesConfig {
    fn validate(self) -> Result<NameSettings, ConfigError> {
        let server = |text: &String| {
            let server = text.parse().ok();
            let server = server.or_else(|| Some(SocketAddr::new(text.parse().ok()?, 53)));
            server.ok_or_else(|| ConfigError::Nameserver(text.clone()))
        };
        let network = |text: &String| {
            let network = text.parse();
            network.map_err(|_| ConfigError::Network(text.clone()))
        };
        let (least, most) = (
            self.least_seconds.unwrap_or(30),
            self.most_seconds.unwrap_or(3600),
        );
        if least == 0 || least > most || most > MOST_AGENT_SECONDS {
            return Err(ConfigError::NameSeconds { least, most });
        }
        Ok(NameSettings {
            nameservers: self
                .nameservers
                .iter()
                .map(server)
                .collect::<Result<_, _>>()?,
            least: Duration::from_secs(least.into()),
            most: Duration::from_secs(most.into()),
            forbid: self.forbid.iter().map(network).collect::<Result<_, _>>()?,
            allow: self.allow.iter().map(network).collect::<Result<_, _>>()?,
        })
    }
}

impl RogueConfig {
    fn validate(self) -> Result<Thresholds, ConfigError> {
        let mut thresholds = Thresholds::default();
        for (word, threshold) in self.thresholds {
            let held =
                |reason: &&Reason| reason.word() == word && reason.is_violation(Direction::Egress);
            let Some(reason) = Reason::ALL.iter().find(held) else {
                return Err(ConfigError::ThresholdReason(word));
            };
            let threshold =
                Threshold::new(threshold.frames, threshold.seconds).map_err(|source| {
                    ConfigError::Threshold {
                        reason: word,
                        source,
                    }
                })?;
            thresholds.set(*reason, threshold);
        }
        Ok(thresholds)
    }
}

impl IncidentsConfig {
    fn validate(self) -> Result<Bounds, ConfigError> {
        let keep = self.keep_mib.unwrap_or(64);
        if !(1..=65_536).contains(&keep) {
            return Err(ConfigError::KeepMib(keep));
        }
        Ok(Bounds::of_bytes(keep << 20))
    }
}

impl JailConfig {
    fn validate(self) -> Result<Jail, ConfigError> {
        let is_plain = |path: &Path| {
            path.is_absolute() && !path.components().any(|part| part == Component::ParentDir)
        };
        if let Some(path) = self.paths.iter().find(|path| !is_plain(path)) {
            return Err(ConfigError::JailPath(path.clone()));
        }
        let uids: Option<UidRange> = self.uids.as_deref().map(str::parse).transpose()?;
        if let Some(uids) = uids.filter(|uids| uids.overlaps(FIRST_USER, LAST_USER)) {
            return Err(ConfigError::TunnelUids(uids));
        }
        let without: Result<_, PartError> = self.without.iter().map(|word| word.parse()).collect();
        Ok(Jail {
            uids: uids.unwrap_or_default(),
            paths: self.paths,
            without: without?,
        })
    }
}

/// Guests of a host mostly wait: 32 to each processor.
fn default_vcpus() -> u64 {
    std::thread::available_parallelism().map_or(32, |cpus| cpus.get() as u64 * 32)
}

fn absolute(what: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    std::path::absolute(&path).map_err(|source| ConfigError::Path { what, path, source })
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes()
        .take(offset)
        .filter(|byte| *byte == b'\n')
        .count()
        + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::read(file.path())
    }

    #[test]
    fn nothing_said_gives_the_documented_defaults() {
        let settings = Config::default().validate().unwrap();
        assert_eq!(settings.socket, Path::new("/run/omerta/omertad.sock"));
        assert!(settings.images.directory.is_none() && settings.images.require_signature);
        assert_eq!(settings.metrics, Some("127.0.0.1:9469".parse().unwrap()));
        assert_eq!(settings.on_violation, OnViolation::Terminate);
        assert!(settings.accel.is_none());
        assert_eq!(settings.jail, Jail::default());
    }

    #[test]
    fn unknown_key_is_refused_with_its_line() {
        let error = read("accel = \"tcg\"\non_violatoin = \"drop\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 2") && error.contains("on_violatoin"),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1);
    }

    #[test]
    fn each_bad_value_is_refused_with_its_name() {
        for (text, names) in [
            ("metrics = \"here\"", "metrics address `here`"),
            ("guest_pool = \"10.77.0.1/16\"", "guest pool: 10.77.0.1"),
            ("guest_pool = \"10.77.0.1/16\"", "write 10.77.0.0/16"),
            ("on_violation = \"shrug\"", "`shrug`"),
            ("uplink_hook = \"generic\"", "`generic`"),
            ("accel = \"hvf\"", "`hvf`"),
            ("machine = \"pc\"", "`pc` is no machine"),
            (
                "[names]\nnameservers = [\"dns.example\"]",
                "nameserver `dns.example`",
            ),
            (
                "[names]\nallow = [\"10.0.0.0/33\"]",
                "`10.0.0.0/33` is no network",
            ),
            ("[names]\nforbid = [\"lan\"]", "`lan` is no network"),
            ("[names]\nleast_seconds = 7200", "least_seconds is 7200"),
            ("[names]\nleast_seconds = 0", "least_seconds is 0"),
            ("max_guests = 0", "max_guests is 0"),
            ("[recovery]\nlease = \"60\"", "[recovery] lease `60`"),
            ("[recovery]\nlease = \"9s\"", "give 10 s or more"),
            ("[tunnel]\nsilent_seconds = 149", "silent_seconds is 149"),
            (
                "[rogue.thresholds]\nnonsense = { frames = 1, seconds = 1 }",
                "`nonsense` is no reason",
            ),
            (
                "[rogue.thresholds]\npoliced = { frames = 1, seconds = 1 }",
                "`policed` is no reason",
            ),
            (
                "[rogue.thresholds]\narp_target = { frames = 201, seconds = 1 }",
                "arp_target: 201 frames in 1 s",
            ),
            ("[incidents]\nkeep_mib = 0", "keep_mib is 0"),
            ("[jail]\nuids = \"0-9\"", "[jail] uids: `0-9`"),
            (
                "[jail]\nuids = \"1900131071-1900131072\"",
                "users of the tunnels",
            ),
            ("[jail]\nwithout = [\"walls\"]", "without: `walls`"),
            ("[jail]\npaths = [\"opt\"]", "[jail] paths: opt"),
            (
                "guest_pool = \"10.77.0.0/30\"\nmax_guests = 2",
                "max_guests is 2",
            ),
        ] {
            let error = crate::failure::report(&read(text).unwrap().validate().unwrap_err());
            assert!(error.contains(names), "{text}: {error}");
            assert_eq!(error.matches(names).count(), 1, "told once: {error}");
        }
        let error = read("max_guests = \"many\"").unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
    }

    #[test]
    fn missing_file_is_named() {
        let error = Config::read(Path::new("/nonexistent/omertad.toml"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/omertad.toml"));
    }
}
