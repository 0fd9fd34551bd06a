//! The hooks of kernels without TCX: filters of a clsact qdisc.
//!
//! A filter is nobody's: it stays when its maker ends, and goes with the qdisc, with the interface,
//! and when the interface moves to another network namespace. A guard's filters are known by their
//! programs, whose ids the kernel gives to no other program while they are pinned.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use omerta_verdict::Direction;

use crate::link;
use crate::netlink::{Object, Subject, append, attribute, change, dump, word};
use crate::object::program_name;

/// Where a guard's filters stand: no preference is before this one, and of equal ones the eldest is
/// asked first (net/sched/cls_api.c, net/sched/cls_bpf.c).
const PREFERENCE: u16 = 1;
/// A guard's filter among those of its preference. One number, so that the filter of the next guard
/// takes the place of this one at once.
const HANDLE: u32 = 1;

// include/uapi/linux/pkt_sched.h and pkt_cls.h.
const TC_H_CLSACT: u32 = 0xffff_fff1;
const TC_H_CLSACT_INGRESS: u32 = 0xffff_fff2;
const TC_H_CLSACT_EGRESS: u32 = 0xffff_fff3;
const TC_H_CLSACT_HANDLE: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAGS_GEN: u16 = 9;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TCA_CLS_FLAGS_SKIP_SW: u32 = 1 << 1;

/// A filter on an interface's hook.
#[derive(Clone, Debug)]
pub struct Filter {
    subject: Subject,
    /// The program that it runs, where it runs one.
    program: Option<u32>,
    /// Whether what the program returns becomes of every frame.
    decides: bool,
    is_guards: bool,
}

impl Filter {
    fn of(object: &Object) -> Self {
        let options = object.attribute(TCA_OPTIONS).unwrap_or_default();
        let option = |kind| attribute(options, kind).and_then(|value| word(value, 0));
        let all = u32::from((libc::ETH_P_ALL as u16).to_be());
        let direct = option(TCA_BPF_FLAGS).unwrap_or(0) & TCA_BPF_FLAG_ACT_DIRECT != 0;
        let skipped = option(TCA_BPF_FLAGS_GEN).unwrap_or(0) & TCA_CLS_FLAGS_SKIP_SW != 0;
        let name = attribute(options, TCA_BPF_NAME).unwrap_or_default();
        Self {
            subject: object.subject,
            program: option(TCA_BPF_ID),
            decides: direct && !skipped && object.subject.info & 0xffff == all,
            is_guards: Direction::ALL.map(name_of).iter().any(|own| own == name),
        }
    }

    /// Whether every frame is judged by `program` here.
    pub fn is_judged_by(&self, program: u32) -> bool {
        self.decides && self.program == Some(program)
    }

    /// Whether it stands where a guard's filter does.
    pub fn is_in_place(&self) -> bool {
        self.preference() == PREFERENCE && self.subject.handle == HANDLE
    }

    /// Whether it is the filter of a guard, of whichever.
    pub fn is_guards(&self) -> bool {
        self.is_guards && self.is_in_place()
    }

    /// Whether a guard's filter stands before it.
    pub fn is_behind(&self) -> bool {
        self.preference() > PREFERENCE
    }

    fn preference(&self) -> u16 {
        (self.subject.info >> 16) as u16
    }
}

/// The filters on the hook of `direction` that a frame meets, first to be asked first. None where
/// there is no such interface.
pub fn filters(ifindex: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let found = all_filters(ifindex, direction)?;
    // A frame begins at chain 0; the others are reached from there alone.
    let begins = |object: &&Object| {
        object
            .attribute(TCA_CHAIN)
            .is_none_or(|chain| word(chain, 0) == Some(0))
    };
    // The kernel also tells of each preference by itself, with handle 0.
    let whole =
        |object: &&Object| object.subject.handle != 0 || object.attribute(TCA_OPTIONS).is_some();
    Ok(found
        .iter()
        .filter(begins)
        .filter(whole)
        .map(Filter::of)
        .collect())
}

fn all_filters(ifindex: u32, direction: Direction) -> io::Result<Vec<Object>> {
    dump(
        libc::RTM_GETTFILTER,
        Subject {
            ifindex,
            parent: parent(direction),
            ..Subject::default()
        },
    )
}

/// Where `program` stands on the hook of `direction`; `None` where it does not judge there.
pub fn place(ifindex: u32, direction: Direction, program: u32) -> io::Result<Option<usize>> {
    let filters = filters(ifindex, direction)?;
    let Some(place) = filters.iter().position(|one| one.is_judged_by(program)) else {
        return Ok(None);
    };
    // Where the kernel has TCX too, its programs are asked before any filter.
    let before = link::has_any(ifindex, direction)?;
    Ok(Some(place + usize::from(before)))
}

/// Has `program` judge on the hook of `direction`; `instead` of the filter that stands in its
/// place, at once, or refused with `EEXIST` where one does.
pub fn put(
    ifindex: u32,
    direction: Direction,
    program: BorrowedFd<'_>,
    instead: bool,
) -> io::Result<()> {
    let mut options = Vec::new();
    append(&mut options, TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
    append(&mut options, TCA_BPF_NAME, &name_of(direction));
    let direct = TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes();
    append(&mut options, TCA_BPF_FLAGS, &direct);
    let mut attributes = kind(b"bpf\0");
    append(&mut attributes, TCA_OPTIONS, &options);
    let flags = if instead { 0 } else { libc::NLM_F_EXCL };
    change(
        libc::RTM_NEWTFILTER,
        libc::NLM_F_CREATE | flags,
        Subject {
            ifindex,
            handle: HANDLE,
            parent: parent(direction),
            info: u32::from(PREFERENCE) << 16 | u32::from((libc::ETH_P_ALL as u16).to_be()),
        },
        &attributes,
    )
}

/// Removes every filter on the hook of `direction` that runs `program`, and no other; whether
/// there was one.
pub fn remove(ifindex: u32, direction: Direction, program: u32) -> io::Result<bool> {
    let mut any = false;
    loop {
        let filters = filters(ifindex, direction)?;
        let Some(filter) = filters.iter().find(|one| one.program == Some(program)) else {
            return Ok(any);
        };
        let subject = Subject {
            ifindex,
            parent: parent(direction),
            ..filter.subject
        };
        change(libc::RTM_DELTFILTER, 0, subject, &kind(b"bpf\0"))?;
        any = true;
    }
}

/// What holds the filters of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qdisc {
    /// Nothing yet.
    None,
    /// A clsact qdisc.
    Clsact,
    /// Something that has no hook for what leaves.
    Other,
}

/// What holds the filters of the interface.
pub fn qdisc(ifindex: u32) -> io::Result<Qdisc> {
    let asked = Subject {
        ifindex,
        ..Subject::default()
    };
    // The kernel tells of all interfaces, whichever was asked for.
    let found = dump(libc::RTM_GETQDISC, asked)?;
    let kind = found
        .iter()
        .find(|one| one.subject.ifindex == ifindex && one.subject.parent == TC_H_CLSACT)
        .map(|one| one.attribute(TCA_KIND) == Some(b"clsact\0"));
    Ok(match kind {
        None => Qdisc::None,
        Some(true) => Qdisc::Clsact,
        Some(false) => Qdisc::Other,
    })
}

/// Adds a clsact qdisc, which alone changes nothing.
pub fn add_qdisc(ifindex: u32) -> io::Result<()> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    change(
        libc::RTM_NEWQDISC,
        flags,
        clsact(ifindex),
        &kind(b"clsact\0"),
    )
}

/// Removes the clsact qdisc, unless filters are in it.
pub fn remove_unused_qdisc(ifindex: u32) -> io::Result<()> {
    for direction in Direction::ALL {
        if !all_filters(ifindex, direction)?.is_empty() {
            return Ok(());
        }
    }
    if qdisc(ifindex)? != Qdisc::Clsact {
        return Ok(());
    }
    change(libc::RTM_DELQDISC, 0, clsact(ifindex), &kind(b"clsact\0"))
}

fn clsact(ifindex: u32) -> Subject {
    Subject {
        ifindex,
        handle: TC_H_CLSACT_HANDLE,
        parent: TC_H_CLSACT,
        info: 0,
    }
}

/// What the guest sends enters the host by the interface's ingress hook, and the other way round.
fn parent(direction: Direction) -> u32 {
    match direction {
        Direction::Egress => TC_H_CLSACT_INGRESS,
        Direction::Ingress => TC_H_CLSACT_EGRESS,
    }
}

fn kind(kind: &[u8]) -> Vec<u8> {
    let mut attributes = Vec::new();
    append(&mut attributes, TCA_KIND, kind);
    attributes
}

/// As `tc filter show` names it.
fn name_of(direction: Direction) -> Vec<u8> {
    format!("omerta:{}\0", program_name(direction)).into_bytes()
}
