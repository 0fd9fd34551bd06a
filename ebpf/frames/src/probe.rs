//! What a back end costs.

use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::scratch::{NAME, ScratchTap};
use crate::{BATCH, BackEnd, FramesError, Reader};

/// Batches in one measurement: some milliseconds.
const BATCHES: usize = 128;
/// Before it: the first frames touch memory that nothing else has.
const WARM_UP: usize = 64;
/// The shortest frame of Ethernet, to nobody.
const FRAME: [u8; 64] = {
    let mut frame = [0; 64];
    frame[0] = 0x52;
    frame[6] = 0x52;
    // An EtherType for experiments (IEEE 802, 0x88b5).
    frame[12] = 0x88;
    frame[13] = 0xb5;
    frame
};

/// Nanoseconds of processor time for one frame of 64 bytes that `back_end` takes from a tap, from the
/// guest's send until it was read, [`BATCH`] frames at a time; on a tap of a namespace of its own.
///
/// # Errors
/// Where the back end does not work here, or lost a frame.
pub fn cost_ns(back_end: BackEnd) -> Result<f64, FramesError> {
    // Namespaces belong to threads: the tap goes with its own.
    thread::scope(|scope| match scope.spawn(|| measure(back_end)).join() {
        Ok(result) => result,
        Err(cause) => std::panic::resume_unwind(cause),
    })
}

fn measure(back_end: BackEnd) -> Result<f64, FramesError> {
    let tap = ScratchTap::in_new_namespace()?;
    let mut reader = Reader::take_by(NAME, back_end)?;
    let mut run = |batches: usize| -> Result<(), FramesError> {
        let (mut got, sent) = (0, batches * BATCH);
        for _ in 0..batches {
            for _ in 0..BATCH {
                tap.send(&FRAME)?;
            }
            while reader.read(|frame| got += usize::from(frame == FRAME))? == BATCH {}
        }
        if got != sent {
            return Err(FramesError::Lost {
                back_end,
                got,
                sent,
            });
        }
        Ok(())
    };
    run(WARM_UP)?;
    let clock = || {
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
            .map(Duration::from)
            .map_err(FramesError::system("read the clock for", NAME))
    };
    let before = clock()?;
    run(BATCHES)?;
    let spent = clock()? - before;
    Ok(spent.as_nanos() as f64 / (BATCHES * BATCH) as f64)
}
