//! The kernel programs: one instance, with maps of its own, for each guard.

use std::io;

use aya::maps::{MapData, MapError};
use aya::programs::{ProgramError, SchedClassifier};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfError, EbpfLoader};
use omerta_verdict::{Direction, Mode, SocketBufferLayout};

use crate::GuardError;
use crate::btf::Btf;
use crate::events::EventStream;
use crate::pins::Pins;
use crate::store::{Value, map_error};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OMERTA_PROGRAMS"));

/// Flows that conntrack mode remembers for one guest.
const FLOWS: u32 = 4096;

/// The name of the program that judges `direction`, as the kernel shows it.
pub const fn program_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => "guest_egress",
        Direction::Ingress => "guest_ingress",
    }
}

/// Fails where this kernel cannot run guards.
pub fn kernel_support() -> Result<(), GuardError> {
    let needed = KernelVersion::new(6, 6, 0);
    if KernelVersion::current().is_ok_and(|current| current >= needed) {
        return Ok(());
    }
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_else(|_| "unknown release".to_owned());
    Err(GuardError::KernelTooOld { release })
}

/// Whether the guard of `pins` was loaded for conntrack mode.
pub fn has_room_for_flows(interface: &str, pins: &Pins) -> Result<bool, GuardError> {
    let flows = MapData::from_pin(pins.path("FLOWS")).and_then(|flows| flows.info());
    Ok(flows
        .map_err(|source| map_error(interface, "read", "FLOWS", source))?
        .max_entries()
        >= FLOWS)
}

/// Programs that are verified but attached to nothing yet.
pub struct Programs {
    ebpf: Ebpf,
    interface: String,
}

impl Programs {
    /// Loads and verifies the programs. `interface` is for messages only.
    pub fn load(interface: &str, mode: Mode) -> Result<Self, GuardError> {
        kernel_support()?;
        let layout = Value(socket_buffer_layout().map_err(|source| GuardError::System {
            action: "find the fields of struct sk_buff in /sys/kernel/btf/vmlinux",
            interface: interface.to_owned(),
            source,
        })?);
        let mut loader = EbpfLoader::new();
        // The programs are built against no kernel's types; what they need of them is set here.
        loader.btf(None).override_global("SKB", &layout, true);
        if mode == Mode::Conntrack {
            loader.map_max_entries("FLOWS", FLOWS);
        }
        let ebpf = loader.load(OBJECT).map_err(|source| {
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
        };
        for direction in Direction::ALL {
            let program = programs.program(direction)?;
            program.load().map_err(|source| GuardError::Program {
                program: program_name(direction),
                interface: interface.to_owned(),
                source: Box::new(source),
            })?;
        }
        Ok(programs)
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

    /// The maps, by name.
    pub(crate) fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }
}

/// Where this kernel keeps what the programs read of a socket buffer.
fn socket_buffer_layout() -> io::Result<SocketBufferLayout> {
    let types = std::fs::read("/sys/kernel/btf/vmlinux")?;
    let unknown = || io::Error::other("this kernel's type information lacks them");
    let names = ["head", "data", "csum_start", "csum_offset", "ip_summed"];
    let fields = Btf::parse(&types).and_then(|btf| btf.fields("sk_buff", names));
    let [head, data, checksum_start, checksum_offset, summed] = fields.ok_or_else(unknown)?;
    let whole = [head, data, checksum_start, checksum_offset];
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
