//! The packet verdict: who sends, what shape, to whom.
//!
//! This crate is the only place where a frame is judged. It has no I/O, no allocation and no
//! `unsafe`: the kernel programs (`ebpf/programs`), the native tests, the fuzz targets and other
//! platforms are shells that give it a [`Frame`] and a [`Guard`] and carry out its [`Verdict`].
//!
//! *Egress* is what the guest sends, *ingress* what is sent to it.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod answer;
mod arp;
mod decide;
mod discovery;
mod endpoint;
mod event;
mod frame;
mod guard;
mod icmp;
mod layout;
mod link;
mod network;
mod policy;
mod rate;
mod reason;
mod state;
mod table;
mod transport;

pub use answer::{ANSWER_CAPACITY, Answer};
pub use decide::{
    Verdict, egress, general_egress, general_ingress, ingress, is_answer_for_guest,
    question_egress, question_ingress, usual_egress, usual_ingress,
};
pub use discovery::solicitation_sum;
pub use endpoint::{Endpoint, EndpointParseError, Protocol};
pub use event::{EVENT_FRAME_BYTES, EventRecord, Failure};
pub use frame::{Frame, PendingChecksum, Segments};
pub use guard::{Flow, Guard, MemoryGuard, SENT_FLOWS, SentFlow};
pub use layout::{FixedInputs, ReadInPlace, SocketBufferLayout};
pub use link::{Mac, MacParseError};
pub use network::{Address, AddressClass};
pub use policy::{MAX_ADDRESSES, MAX_GATEWAYS, Mode, Policy};
pub use rate::{Meter, Rate};
pub use reason::{DIRECTION_COUNTERS, Direction, OWN_ANSWERS_COUNTER, Outcome, RX_COUNTER, Reason};
pub use state::{COUNTER_ROWS, FLOWS, GUARDS, INLINE_BUCKETS, LOST_ROW, Live, Slot, State};
pub use table::{BUCKET_RULES, Bucket, MAX_PROBES, Table, table_holds};
