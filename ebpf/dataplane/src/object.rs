//! The kernel programs, loaded: by a network namespace's guards, or by a test for itself.

use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use aya::maps::{Array, Map, MapData, MapError};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfError, EbpfLoader};
use nix::time::{ClockId, clock_getres};
use omerta_verdict::{Direction, FixedInputs, Flow, Live, Mode, SocketBufferLayout};

use crate::btf::Btf;
use crate::events::EventStream;
use crate::flows::{self, FlowMap};
use crate::in_place::read_in_place;
use crate::layout::Digest;
use crate::own::{self, OwnMaps};
use crate::random::Random;
use crate::shared::Shared;
use crate::store::{Value, map_error};
use crate::{GuardError, Hook, constants, diagnostics, redirect};

pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OMERTA_PROGRAMS"));

/// Bytes of the ring of diagnostics, which tells a few lines in ten seconds.
const DIAGNOSTICS_BYTES: u32 = 4096;

/// The name of the program that judges `direction`, as the kernel shows it.
pub const fn program_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => "guest_egress",
        Direction::Ingress => "guest_ingress",
    }
}

/// An object whose programs are verified, and attached to nothing.
pub struct Loaded {
    pub ebpf: Ebpf,
    /// Whether the kernel has taken the programs with their reads of its structures in place of calls.
    pub reads_in_place: bool,
}

/// Loads and verifies the programs, with clock and chance as `inputs` fixes them. Their own answers bear
/// `mark`. `interface` is for messages only.
pub fn load(interface: &str, inputs: FixedInputs, mark: u32) -> Result<Loaded, GuardError> {
    Hook::of_this_kernel()?;
    let kernel = Fitted::to_this_kernel().map_err(|source| GuardError::System {
        action: "find the fields of struct sk_buff and skb_shared_info in /sys/kernel/btf/vmlinux",
        interface: interface.to_owned(),
        source,
    })?;
    let load = |object, reads_in_place| {
        load_object(object, kernel, interface, inputs, mark).map(|ebpf| Loaded {
            ebpf,
            reads_in_place,
        })
    };
    match &kernel.object {
        // A kernel that does not take it (without a just-in-time compiler, for one) says more
        // of the object as it was compiled.
        Some(object) => load(object, true).or_else(|_| load(OBJECT, false)),
        None => load(OBJECT, false),
    }
}

fn load_object(
    object: &[u8],
    kernel: &Fitted,
    interface: &str,
    inputs: FixedInputs,
    mark: u32,
) -> Result<Ebpf, GuardError> {
    let mut object = object.to_vec();
    let layout = Value(kernel.layout);
    let inputs = Value(inputs);
    let constants = [
        ("SKB", bytes_of(&layout)),
        ("TICK_NS", bytes_of(&kernel.tick_ns)),
        ("FIXED", bytes_of(&inputs)),
        ("MARK", bytes_of(&mark)),
    ];
    for (name, bytes) in constants {
        constants::write(&mut object, name, bytes).map_err(|source| GuardError::System {
            action: "fit the programs to this kernel",
            interface: interface.to_owned(),
            source,
        })?;
    }
    let loaded = loader().load(&object);
    let mut ebpf = loaded.map_err(|source| {
        if is_permission(&source) {
            GuardError::NotPermitted
        } else {
            GuardError::Load {
                interface: interface.to_owned(),
                source: Box::new(source),
            }
        }
    })?;
    for direction in Direction::ALL {
        program(&mut ebpf, direction, interface)?
            .load()
            .map_err(|error| GuardError::of_program(program_name(direction), interface, error))?;
    }
    Ok(ebpf)
}

/// The program of one direction.
pub fn program<'a>(
    ebpf: &'a mut Ebpf,
    direction: Direction,
    interface: &str,
) -> Result<&'a mut SchedClassifier, GuardError> {
    let name = program_name(direction);
    let missing = |source| GuardError::Program {
        program: name,
        interface: interface.to_owned(),
        source: Box::new(source),
    };
    match ebpf.program_mut(name) {
        Some(program) => program.try_into().map_err(missing),
        None => Err(missing(ProgramError::NotLoaded)),
    }
}

/// Programs of one's own with the maps of one guard in their first place, attached to nothing: for tests
/// and benches.
pub struct Programs {
    ebpf: Ebpf,
    shared: Shared,
    own: OwnMaps,
    interface: String,
    reads_in_place: bool,
}

impl Programs {
    /// Loads and verifies the programs. `interface` is for messages only.
    pub fn load(interface: &str, mode: Mode) -> Result<Self, GuardError> {
        Self::load_with(interface, mode, FixedInputs::NONE)
    }

    /// As [`Programs::load`], with clock and chance as `inputs` fixes them: for tests that compute
    /// the same verdicts again. Never for a guard.
    pub fn load_with(interface: &str, mode: Mode, inputs: FixedInputs) -> Result<Self, GuardError> {
        let mark = secret().map_err(|source| GuardError::System {
            action: "read random numbers",
            interface: interface.to_owned(),
            source,
        })?;
        let loaded = load(interface, inputs, mark)?;
        Self::of(loaded, interface, mode == Mode::Conntrack)
    }

    fn of(loaded: Loaded, interface: &str, with_flows: bool) -> Result<Self, GuardError> {
        let Loaded {
            ebpf,
            reads_in_place,
        } = loaded;
        let made = || {
            let shared = Shared::of(&ebpf)?;
            let own = OwnMaps::create(with_flows)?;
            own.put(&shared, 0)?;
            Ok((shared, own))
        };
        let (shared, own) = made().map_err(|source| GuardError::System {
            action: "make the maps",
            interface: interface.to_owned(),
            source,
        })?;
        Ok(Self {
            ebpf,
            shared,
            own,
            interface: interface.to_owned(),
            reads_in_place,
        })
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

    /// Whether the kernel has taken the programs with their reads of its structures in place of calls.
    pub fn reads_in_place(&self) -> bool {
        self.reads_in_place
    }

    /// The tables, and the guard's own maps.
    pub(crate) fn maps(&self) -> (&Shared, &OwnMaps) {
        (&self.shared, &self.own)
    }

    /// Other programs that read socket buffers, and look for guards, as the guards' do, of a bench: nothing
    /// of them is verified yet. `constants` and the `sizes` of maps are theirs.
    #[doc(hidden)]
    pub fn fitted(
        object: &[u8],
        constants: &[(&str, u32)],
        sizes: &[(&str, u32)],
    ) -> Result<Self, GuardError> {
        let failed = |source| GuardError::System {
            action: "fit programs to this kernel's types",
            interface: "bench".to_owned(),
            source,
        };
        let kernel = Fitted::to_this_kernel().map_err(failed)?;
        let (layout, tick_ns) = (Value(kernel.layout), kernel.tick_ns);
        let types = std::fs::read("/sys/kernel/btf/vmlinux").map_err(failed)?;
        let in_place = Btf::parse(&types).and_then(|types| read_in_place(object, &types));
        let mut loader = EbpfLoader::new();
        loader
            .btf(None)
            .map_max_entries(diagnostics::RING, DIAGNOSTICS_BYTES)
            .override_global("SKB", &layout, true)
            .override_global("TICK_NS", &tick_ns, true);
        for (name, constant) in constants {
            loader.override_global(name, constant, true);
        }
        for (name, size) in sizes {
            loader.map_max_entries(name, *size);
        }
        let ebpf = loader
            .load(in_place.as_deref().unwrap_or(object))
            .map_err(|source| GuardError::Load {
                interface: "bench".to_owned(),
                source: Box::new(source),
            })?;
        let loaded = Loaded {
            ebpf,
            reads_in_place: in_place.is_some(),
        };
        Self::of(loaded, "bench", true)
    }

    /// The program of one direction.
    pub fn program(&mut self, direction: Direction) -> Result<&mut SchedClassifier, GuardError> {
        program(&mut self.ebpf, direction, &self.interface)
    }

    /// The object, with other programs and maps.
    #[doc(hidden)]
    pub fn object(&self) -> &Ebpf {
        &self.ebpf
    }

    /// Likewise, to be loaded.
    #[doc(hidden)]
    pub fn object_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// The events. Two streams would each see a part: keep one.
    pub fn take_events(&mut self) -> Result<EventStream, GuardError> {
        let ring = self.own.data(own::EVENTS);
        ring.and_then(|data| EventStream::of(Map::RingBuf(data)))
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
        if !self.own.with_flows() {
            return Ok(Vec::new());
        }
        let flows = self.flow_table().map_err(failed)?;
        flows
            .iter()
            .map(|flow| flow.map(|(Value(flow), seen)| (flow, seen)).map_err(failed))
            .collect()
    }

    fn flow_table(&self) -> Result<FlowMap, MapError> {
        let flows = self.own.data(own::FLOW_TABLE)?;
        FlowMap::try_from(Map::HashMap(flows))
    }

    /// What the programs write for the guard.
    pub fn live(&mut self) -> Result<Live, GuardError> {
        self.live_map()
            .and_then(|live| live.get(&0, 0))
            .map(|Value(live)| live)
            .map_err(|source| map_error("tests", "read", "LIVE", source))
    }

    /// Changes it: for tests in which no program runs meanwhile.
    pub fn edit_live(&mut self, edit: impl FnOnce(&mut Live)) -> Result<(), GuardError> {
        let mut live = self.live()?;
        edit(&mut live);
        self.live_map()
            .and_then(|mut map| map.set(0, Value(live), 0))
            .map_err(|source| map_error("tests", "write", "LIVE", source))
    }

    fn live_map(&self) -> Result<Array<MapData, Value<Live>>, MapError> {
        Array::try_from(Map::Array(self.own.data(own::LIVE)?))
    }
}

/// The bytes of a value that has no padding.
pub fn bytes_of<T: aya::Pod>(value: &T) -> &[u8] {
    // SAFETY: `Pod` is for types of whose bytes each is initialised; the slice is as long as the value
    // and lives as long.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The loader of all guards' objects: to make one, aya reads all of the kernel's types, which takes
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

/// A number that nobody else can know, and not 0: what marks the guards' own answers, or tells a guard from
/// others in its place.
pub fn secret() -> io::Result<u32> {
    let mut random = Random::open()?;
    let secret = random.word() as u32 | 1;
    random.finish()?;
    Ok(secret)
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
