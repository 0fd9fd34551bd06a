//! The kernel programs: one instance, with maps of its own, for each guard.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use aya::maps::{Array, MapData, MapError};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfError, EbpfLoader};
use nix::time::{ClockId, clock_getres};
use omerta_verdict::{
    Direction, FixedInputs, Flow, Mode, SENT_FLOWS, SentFlow, SocketBufferLayout,
};

use crate::bpffs::failed;
use crate::btf::Btf;
use crate::events::EventStream;
use crate::flows::{self, FLOWS, FlowMap};
use crate::in_place::read_in_place;
use crate::layout::Digest;
use crate::pins::{Pins, is_pin};
use crate::random::Random;
use crate::store::{Value, map_error};
use crate::upgrade::Counting;
use crate::{GuardError, Hook, constants, diagnostics, redirect};

pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OMERTA_PROGRAMS"));

/// The maps that are judged by, which programs of the same layout can share.
pub const JUDGED: [&str; 6] = [
    "STATE",
    "RULES",
    "METERS",
    "FLOWS",
    "FLOW_PLACES",
    "FLOW_HAND",
];
/// Those of what is counted and told.
pub const ACCOUNTS: [&str; 3] = ["COUNTERS", "LOST", "EVENTS"];
/// The map of what the programs keep without a map's name: flows that the guest sent on.
pub const SENT: &str = ".bss";
/// The name of its pin. bpffs refuses names with dots.
pub const SENT_PIN: &str = "SENT";
pub type SentFlows = [SentFlow; SENT_FLOWS];

/// Bytes of the ring of diagnostics, which tells a few lines in ten seconds; the least there is.
const DIAGNOSTICS_BYTES: u32 = 4096;

/// The name of the program that judges `direction`, as the kernel shows it.
pub const fn program_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => "guest_egress",
        Direction::Ingress => "guest_ingress",
    }
}

/// Whether the guard of `pins` was loaded for conntrack mode.
pub fn has_room_for_flows(interface: &str, pins: &Pins) -> Result<bool, GuardError> {
    Ok(room_for_flows(interface, pins)? >= FLOWS)
}

fn room_for_flows(interface: &str, pins: &Pins) -> Result<u32, GuardError> {
    MapData::from_pin(pins.path("FLOWS"))
        .and_then(|flows| flows.info())
        .map(|flows| flows.max_entries())
        .map_err(|source| map_error(interface, "read", "FLOWS", source))
}

/// Programs that are verified but attached to nothing yet.
pub struct Programs {
    ebpf: Ebpf,
    interface: String,
    reads_in_place: bool,
    mark: u32,
}

/// What programs are loaded with.
struct Wanted<'a> {
    interface: &'a str,
    /// Flows that there is room for.
    flows: u32,
    inputs: FixedInputs,
    mark: u32,
    /// Pinned maps, by their names, that are not to be made anew.
    maps: Vec<(&'static str, PathBuf)>,
}

impl Programs {
    /// Loads and verifies the programs. `interface` is for messages only.
    pub fn load(interface: &str, mode: Mode) -> Result<Self, GuardError> {
        Self::load_with(interface, mode, FixedInputs::NONE)
    }

    /// As [`Programs::load`], with clock and chance as `inputs` fixes them: for tests that compute
    /// the same verdicts again. Never for a guard.
    pub fn load_with(interface: &str, mode: Mode, inputs: FixedInputs) -> Result<Self, GuardError> {
        let mark = random_mark().map_err(|source| GuardError::System {
            action: "read random numbers",
            interface: interface.to_owned(),
            source,
        })?;
        let flows = match mode {
            Mode::Conntrack => FLOWS,
            _ => 1,
        };
        Self::load_as(&Wanted {
            interface,
            flows,
            inputs,
            mark,
            maps: Vec::new(),
        })
    }

    /// Programs that judge by the maps of the guard of `pins`, and count in them where that is `Continued`.
    pub(crate) fn load_over(
        interface: &str,
        pins: &Pins,
        counting: Counting,
    ) -> Result<Self, GuardError> {
        let counted = match counting {
            Counting::Continued => &ACCOUNTS[..],
            Counting::Afresh => &[],
        };
        let mut maps = Vec::new();
        for name in JUDGED.iter().chain(counted) {
            let path = pins.path(name);
            if !is_pin(&path)? {
                let missing = io::ErrorKind::NotFound.into();
                return Err(failed("open", &path)(missing));
            }
            maps.push((*name, path));
        }
        Self::load_as(&Wanted {
            interface,
            flows: room_for_flows(interface, pins)?,
            inputs: FixedInputs::NONE,
            mark: pins.mark()?,
            maps,
        })
    }

    fn load_as(wanted: &Wanted<'_>) -> Result<Self, GuardError> {
        Hook::of_this_kernel()?;
        let kernel = Fitted::to_this_kernel().map_err(|source| GuardError::System {
            action: "find the fields of struct sk_buff and skb_shared_info in /sys/kernel/btf/vmlinux",
            interface: wanted.interface.to_owned(),
            source,
        })?;
        let load = |object| Self::load_object(object, kernel, wanted);
        match &kernel.object {
            // A kernel that does not take it (without a just-in-time compiler, for one) says more
            // of the object as it was compiled.
            Some(object) => load(object)
                .map(|programs| Self {
                    reads_in_place: true,
                    ..programs
                })
                .or_else(|_| load(OBJECT)),
            None => load(OBJECT),
        }
    }

    /// A number that is another for another build of the programs.
    pub(crate) fn build() -> u64 {
        static BUILD: OnceLock<u64> = OnceLock::new();
        *BUILD.get_or_init(|| {
            let mut digest = Digest::new();
            digest.add(OBJECT);
            digest.add(redirect::OBJECT);
            digest.value()
        })
    }

    /// By what the guard knows its own answers.
    pub(crate) fn mark(&self) -> u32 {
        self.mark
    }

    /// Whether the kernel has taken the programs with their reads of its structures in place of calls.
    pub fn reads_in_place(&self) -> bool {
        self.reads_in_place
    }

    fn load_object(
        object: &[u8],
        kernel: &Fitted,
        wanted: &Wanted<'_>,
    ) -> Result<Self, GuardError> {
        let (interface, flows) = (wanted.interface, wanted.flows);
        let mut object = object.to_vec();
        let layout = Value(kernel.layout);
        let inputs = Value(wanted.inputs);
        // A power of two.
        let mask = flows.saturating_sub(1);
        let constants = [
            ("SKB", bytes_of(&layout)),
            ("TICK_NS", bytes_of(&kernel.tick_ns)),
            ("FIXED", bytes_of(&inputs)),
            ("MARK", bytes_of(&wanted.mark)),
            ("FLOW_MASK", bytes_of(&mask)),
        ];
        for (name, bytes) in constants {
            constants::write(&mut object, name, bytes).map_err(|source| GuardError::System {
                action: "fit the programs to this kernel",
                interface: interface.to_owned(),
                source,
            })?;
        }
        let (mut own, mut shared);
        let loader = if wanted.maps.is_empty() {
            shared = loader();
            &mut *shared
        } else {
            // Once told of a pin, a loader keeps to it.
            own = new_loader();
            &mut own
        };
        loader
            .map_max_entries("FLOWS", flows)
            .map_max_entries("FLOW_PLACES", flows);
        for (name, path) in &wanted.maps {
            loader.map_pin_path(name, path.clone());
        }
        let loaded = loader.load(&object);
        let ebpf = loaded.map_err(|source| {
            if is_permission(&source) {
                GuardError::NotPermitted
            } else {
                GuardError::Load {
                    interface: interface.to_owned(),
                    source: Box::new(source),
                }
            }
        })?;
        let mut programs = Self {
            ebpf,
            interface: interface.to_owned(),
            reads_in_place: false,
            mark: wanted.mark,
        };
        for direction in Direction::ALL {
            let program = programs.program(direction)?;
            program.load().map_err(|error| {
                GuardError::of_program(program_name(direction), interface, error)
            })?;
        }
        Ok(programs)
    }

    /// Other programs that read socket buffers as the guard's do, of a bench: nothing of them is
    /// verified yet.
    #[doc(hidden)]
    pub fn fitted(object: &[u8]) -> Result<Ebpf, GuardError> {
        let failed = |source| GuardError::System {
            action: "fit programs to this kernel's types",
            interface: "bench".to_owned(),
            source,
        };
        let kernel = Fitted::to_this_kernel().map_err(failed)?;
        let (layout, tick_ns) = (Value(kernel.layout), kernel.tick_ns);
        let types = std::fs::read("/sys/kernel/btf/vmlinux").map_err(failed)?;
        let in_place = Btf::parse(&types).and_then(|types| read_in_place(object, &types));
        EbpfLoader::new()
            .btf(None)
            .map_max_entries(diagnostics::RING, DIAGNOSTICS_BYTES)
            .override_global("SKB", &layout, true)
            .override_global("TICK_NS", &tick_ns, true)
            .load(in_place.as_deref().unwrap_or(object))
            .map_err(|source| GuardError::Load {
                interface: "bench".to_owned(),
                source: Box::new(source),
            })
    }

    /// The program of one direction.
    pub fn program(&mut self, direction: Direction) -> Result<&mut SchedClassifier, GuardError> {
        let name = program_name(direction);
        let missing = |source| GuardError::Program {
            program: name,
            interface: self.interface.clone(),
            source: Box::new(source),
        };
        match self.ebpf.program_mut(name) {
            Some(program) => program.try_into().map_err(missing),
            None => Err(missing(ProgramError::NotLoaded)),
        }
    }

    /// The events of programs that are not pinned. Taken once.
    pub fn take_events(&mut self) -> Result<EventStream, GuardError> {
        let map = self.ebpf.take_map("EVENTS").ok_or(MapError::InvalidName {
            name: "EVENTS".into(),
        });
        map.and_then(EventStream::of)
            .map_err(|source| map_error(&self.interface, "open", "EVENTS", source))
    }

    /// Puts `flow` into the table of flows, as if the guest had last sent on it at `seen_ns`; or
    /// takes it out.
    pub fn set_flow(&mut self, flow: &Flow, seen_ns: Option<u64>) -> Result<(), GuardError> {
        let failed = |source| map_error("tests", "write", "FLOWS", source);
        let mut flows = self.flow_table().map_err(failed)?;
        match seen_ns {
            Some(seen) => flows.insert(Value(*flow), seen, 0).map_err(failed),
            None => flows::remove(&mut flows, *flow).map_err(failed),
        }
    }

    /// The table of flows: when the guest last sent on each, in nanoseconds.
    pub fn flows(&mut self) -> Result<Vec<(Flow, u64)>, GuardError> {
        let failed = |source| map_error("tests", "read", "FLOWS", source);
        let flows = self.flow_table().map_err(failed)?;
        flows
            .iter()
            .map(|flow| flow.map(|(Value(flow), seen)| (flow, seen)).map_err(failed))
            .collect()
    }

    /// What the guest sent on outside of conntrack mode, by place.
    pub fn sent_flows(&mut self) -> Result<Vec<SentFlow>, GuardError> {
        self.sent_table()
            .and_then(|table| table.get(&0, 0))
            .map(|Value(sent)| sent.to_vec())
            .map_err(|source| map_error("tests", "read", SENT, source))
    }

    /// Writes what [`Programs::sent_flows`] reads.
    pub fn set_sent_flows(&mut self, sent: SentFlows) -> Result<(), GuardError> {
        self.sent_table()
            .and_then(|mut table| table.set(0, Value(sent), 0))
            .map_err(|source| map_error("tests", "write", SENT, source))
    }

    fn sent_table(&mut self) -> Result<Array<&mut MapData, Value<SentFlows>>, MapError> {
        let found = self
            .ebpf
            .map_mut(SENT)
            .ok_or(MapError::InvalidName { name: SENT.into() });
        found.and_then(Array::try_from)
    }

    fn flow_table(&mut self) -> Result<FlowMap<&mut MapData>, MapError> {
        let map = self.ebpf.map_mut("FLOWS").ok_or(MapError::InvalidName {
            name: "FLOWS".into(),
        });
        map.and_then(FlowMap::try_from)
    }

    /// Writes word `index` of `map`, which is METERS.
    pub fn set_word(&mut self, map: &'static str, index: u32, word: u64) -> Result<(), GuardError> {
        self.words(map)
            .and_then(|mut words| words.set(index, word, 0))
            .map_err(|source| map_error("tests", "write", map, source))
    }

    /// Word `index` of `map`, which is METERS.
    pub fn word(&mut self, map: &'static str, index: u32) -> Result<u64, GuardError> {
        self.words(map)
            .and_then(|words| words.get(&index, 0))
            .map_err(|source| map_error("tests", "read", map, source))
    }

    fn words(&mut self, map: &'static str) -> Result<Array<&mut MapData, u64>, MapError> {
        let found = self
            .ebpf
            .map_mut(map)
            .ok_or(MapError::InvalidName { name: map.into() });
        found.and_then(Array::try_from)
    }

    /// The maps, by name.
    pub(crate) fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }
}

/// The bytes of a value that has no padding.
pub fn bytes_of<T: aya::Pod>(value: &T) -> &[u8] {
    // SAFETY: `Pod` is for types of whose bytes each is initialised; the slice is as long as the value
    // and lives as long.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The loader of all new guards' objects: to make one, aya reads all of the kernel's types, which takes
/// 17 ms and 16 MiB. The programs are built against no kernel's types and need none of them.
fn loader() -> MutexGuard<'static, EbpfLoader<'static>> {
    static LOADER: OnceLock<Mutex<EbpfLoader<'static>>> = OnceLock::new();
    let loader = LOADER.get_or_init(|| Mutex::new(new_loader()));
    // Its settings are the same after any load.
    loader.lock().unwrap_or_else(PoisonError::into_inner)
}

fn new_loader() -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader
        .btf(None)
        .map_max_entries(diagnostics::RING, DIAGNOSTICS_BYTES);
    loader
}

/// What marks one guard's own answers: nobody else can know it. Not 0, which marks nothing.
fn random_mark() -> io::Result<u32> {
    let mut random = Random::open()?;
    let mark = random.word() as u32 | 1;
    random.finish()?;
    Ok(mark)
}

/// What is found once of the running kernel, whose types do not change.
struct Fitted {
    layout: SocketBufferLayout,
    /// The length of a tick.
    tick_ns: u64,
    /// The object with its reads in place, where the kernel can have them so.
    object: Option<Vec<u8>>,
}

impl Fitted {
    fn to_this_kernel() -> io::Result<&'static Self> {
        static FITTED: OnceLock<Fitted> = OnceLock::new();
        if let Some(fitted) = FITTED.get() {
            return Ok(fitted);
        }
        let types = std::fs::read("/sys/kernel/btf/vmlinux")?;
        let types = Btf::parse(&types).ok_or_else(unknown)?;
        let fitted = Self {
            layout: socket_buffer_layout(&types)?,
            tick_ns: tick_ns()?,
            object: read_in_place(OBJECT, &types),
        };
        Ok(FITTED.get_or_init(|| fitted))
    }
}

/// The coarse clocks go on with each tick, so it is what they tell as their resolution.
fn tick_ns() -> io::Result<u64> {
    let resolution = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)?;
    let tick = Duration::from(resolution).as_nanos();
    match u64::try_from(tick) {
        Ok(tick @ 1..) => Ok(tick),
        _ => Err(io::Error::other("the coarse clock has no resolution")),
    }
}

fn unknown() -> io::Error {
    io::Error::other("this kernel's type information lacks them")
}

/// Where this kernel keeps what the programs read of a socket buffer.
fn socket_buffer_layout(btf: &Btf<'_>) -> io::Result<SocketBufferLayout> {
    let names = [
        "head",
        "data",
        "csum_start",
        "csum_offset",
        "ip_summed",
        "end",
    ];
    let [head, data, checksum_start, checksum_offset, summed, end] =
        btf.fields("sk_buff", names).ok_or_else(unknown)?;
    let [kinds] = btf
        .fields("skb_shared_info", ["gso_type"])
        .ok_or_else(unknown)?;
    // A kind that is not found is never admitted, and neither is what a missing detail adds to it.
    let [tcp4, tcp6, udp, details @ ..] = btf
        .constants([
            "SKB_GSO_TCPV4",
            "SKB_GSO_TCPV6",
            "SKB_GSO_UDP_L4",
            "SKB_GSO_DODGY",
            "SKB_GSO_TCP_ECN",
            "SKB_GSO_TCP_FIXEDID",
            "SKB_GSO_TCP_ACCECN",
        ])
        .map(Option::unwrap_or_default);
    let whole = [head, data, checksum_start, checksum_offset, end, kinds];
    let shift = summed.bit_offset % 8;
    if whole
        .iter()
        .any(|field| field.bits != 0 || field.bit_offset % 8 != 0)
        || summed.bits != 2
        || shift > 6
    {
        return Err(unknown());
    }
    let shift = if cfg!(target_endian = "big") {
        6 - shift
    } else {
        shift
    };
    Ok(SocketBufferLayout {
        head: head.bit_offset / 8,
        data: data.bit_offset / 8,
        checksum_start: checksum_start.bit_offset / 8,
        checksum_offset: checksum_offset.bit_offset / 8,
        summed: summed.bit_offset / 8,
        summed_mask: 3 << shift,
        end: end.bit_offset / 8,
        segment_kinds: kinds.bit_offset / 8,
        segments: [tcp4, tcp6, udp],
        segment_details: details.into_iter().fold(0, |all, bit| all | bit),
    })
}

fn is_permission(error: &EbpfError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io
                .raw_os_error()
                .is_some_and(|code| code == libc::EPERM || code == libc::EACCES);
        }
        cause = error.source();
    }
    false
}
