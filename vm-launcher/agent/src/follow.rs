//! The image's own program by which a guest follows its consumer.

use std::net::SocketAddrV4;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::guest::FollowError;

const PROGRAM: &str = "/usr/lib/omerta/follow";
/// How long it may take. The host waits for the answer meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);

/// Has the guest's firewall, routes and tunnel be for a consumer that is there.
pub(crate) fn to(consumer: SocketAddrV4) -> Result<(), FollowError> {
    run(PROGRAM, consumer)
}

fn run(program: &'static str, consumer: SocketAddrV4) -> Result<(), FollowError> {
    let failed = |source| FollowError::Run { program, source };
    let mut child = Command::new(program)
        .arg(consumer.ip().to_string())
        .arg(consumer.port().to_string())
        .stdin(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match child.try_wait().map_err(failed)? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(FollowError::Failed { program, status }),
            None if Instant::now() > end => {
                // It may have ended this very moment.
                let _ = child.kill();
                let _ = child.wait();
                return Err(FollowError::Slow(program));
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
