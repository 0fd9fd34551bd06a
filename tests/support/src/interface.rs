//! Interfaces of the current namespace.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::StageError;

/// The kernel's index of an interface.
///
/// # Errors
/// Where the current namespace has no such interface.
pub fn index_of(name: &str) -> Result<u32, StageError> {
    if_nametoindex(name).map_err(failed("find", name))
}

/// The interface's MAC address.
///
/// # Errors
/// Where the current namespace has no such interface.
pub fn mac_of(name: &str) -> Result<[u8; 6], StageError> {
    let control = control_socket(name)?;
    let mut request = request(name)?;
    // SAFETY: SIOCGIFHWADDR writes a sockaddr into the request, which outlives the call; the union
    // member read afterwards is the one that the call filled.
    let bytes = unsafe {
        if libc::ioctl(control.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) < 0 {
            return Err(failed("read the MAC of", name)(nix::Error::last()));
        }
        request.ifr_ifru.ifru_hwaddr.sa_data
    };
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(bytes) {
        *to = from.to_ne_bytes()[0];
    }
    Ok(mac)
}

/// Sets the interface up.
///
/// # Errors
/// Where the current namespace has no such interface, or without root.
pub fn bring_up(name: &str) -> Result<(), StageError> {
    bring_up_by(&control_socket(name)?, name)
}

/// Runs `ip` in the current namespace with arguments separated by blanks.
///
/// # Errors
/// Where `ip` is missing or refuses.
pub fn ip(arguments: &str) -> Result<(), StageError> {
    run_ip(Command::new("ip"), arguments)
}

pub(crate) fn run_ip(mut command: Command, arguments: &str) -> Result<(), StageError> {
    // A group of its own: the terminal's Ctrl-C must not cut a change in half.
    let output = command
        .process_group(0)
        .args(arguments.split_whitespace())
        .output()
        .map_err(|source| StageError::Process {
            action: "run",
            program: "ip".to_owned(),
            source,
        })?;
    if output.status.success() {
        return Ok(());
    }
    Err(StageError::Command {
        command: format!("ip {arguments}"),
        status: output.status,
        complaint: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// A socket through which interfaces of the current namespace are changed, from any namespace.
pub(crate) fn control_socket(name: &str) -> Result<OwnedFd, StageError> {
    socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(failed("reach", name))
}

pub(crate) fn bring_up_by(control: &impl AsFd, name: &str) -> Result<(), StageError> {
    let mut request = request(name)?;
    let control = control.as_fd().as_raw_fd();
    // SAFETY: both calls read and write only the request, which outlives them, and the union
    // member used is the one that SIOCGIFFLAGS filled.
    let answer = unsafe {
        if libc::ioctl(control, libc::SIOCGIFFLAGS, &raw mut request) < 0 {
            -1
        } else {
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
            libc::ioctl(control, libc::SIOCSIFFLAGS, &raw const request)
        }
    };
    if answer < 0 {
        return Err(failed("set up", name)(nix::Error::last()));
    }
    Ok(())
}

/// An empty request that names the interface.
pub(crate) fn request(name: &str) -> Result<libc::ifreq, StageError> {
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(failed("name", name)(nix::Error::EINVAL));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

pub(crate) fn failed(
    action: &'static str,
    name: &str,
) -> impl FnOnce(nix::Error) -> StageError + use<> {
    let name = name.to_owned();
    move |errno| StageError::Interface {
        action,
        name,
        source: io::Error::from(errno),
    }
}
