//! The guest's tap: made by `/dev/net/tun`, configured by rtnetlink, gone when its last
//! descriptor closes. It is never persistent, so a crash leaves none behind.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use omerta_verdict::Mac;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

/// Why a tap could not be made or configured.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no tun driver here.
    #[error("/dev/net/tun cannot be opened; load the driver with `modprobe tun`")]
    NoTun(#[source] io::Error),
    /// An interface of that name exists.
    #[error(
        "interface {0} already exists; end the guest that uses it or remove it with `ip link delete {0}`"
    )]
    Exists(String),
    /// It was removed, renamed, or made anew by another; or it is another's to use.
    #[error("the tap {0} is gone, or QEMU alone has it")]
    Gone(String),
    /// The kernel refused to make the tap.
    #[error("cannot create the tap {name}; it takes root or CAP_NET_ADMIN")]
    Create {
        /// The tap's name.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A setting could not be made.
    #[error("cannot write {}", path.display())]
    Sysctl {
        /// The setting's file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// rtnetlink could not be opened.
    #[error("cannot open rtnetlink")]
    Netlink(#[source] io::Error),
    /// Its guest's address belongs to another interface.
    #[error(
        "tap {name} cannot have {address}: this network namespace routes it elsewhere (see `ip route get {address}`); end the guest that has it, or take another guest pool"
    )]
    AddressTaken {
        /// The tap's name.
        name: String,
        /// The guest's address.
        address: Ipv4Addr,
    },
    /// rtnetlink refused a change.
    #[error("cannot {action} on the tap {name}")]
    Configure {
        /// What was tried.
        action: &'static str,
        /// The tap's name.
        name: String,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// A frame could not be written, or the tap's header size not be read.
    #[error("cannot {action} the tap {name}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The tap's name.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A tap that is ours until dropped. QEMU holds the same one by an inherited descriptor; the
/// interface goes when both have let go.
#[derive(Debug)]
pub(crate) struct Tap {
    /// None where QEMU alone has it open.
    device: Option<File>,
    name: String,
    index: u32,
}

impl Tap {
    /// Makes a tap called `name`, down, with the host's side at `mac` and IPv6 off.
    pub(crate) async fn create(name: &str, mac: Mac) -> Result<Self, TapError> {
        let tap = Self::open_exclusively(name)?;
        // IPv6 goes before the link can come up: no address, no solicitation, nothing to filter.
        tap.set_sysctl("ipv6", "disable_ipv6", "1")?;
        tap.set_sysctl("ipv6", "accept_ra", "0")?;
        let netlink = Netlink::open()?;
        let link = LinkUnspec::new_with_index(tap.index)
            .address(mac.0.to_vec())
            .build();
        tap.checked(
            "set the MAC address",
            netlink.handle.link().set(link).execute().await,
        )?;
        Ok(tap)
    }

    fn open_exclusively(name: &str) -> Result<Self, TapError> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(TapError::NoTun)?;
        let create = |source: io::Error| TapError::Create {
            name: name.to_owned(),
            source,
        };
        // SAFETY: all zero is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let room = request.ifr_name.len() - 1;
        if name.len() > room {
            return Err(create(Errno::ENAMETOOLONG.into()));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        // IFF_TUN_EXCL: a tap that exists already, perhaps someone's persistent one, is refused.
        // No IFF_VNET_HDR: its header asks the host to write a checksum where the guest says, or
        // to cut a datagram into fragments, both after the guard has judged the frame.
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_TUN_EXCL;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
        match Errno::result(result) {
            Ok(_) => {}
            Err(Errno::EBUSY | Errno::EEXIST) => return Err(TapError::Exists(name.to_owned())),
            Err(errno) => return Err(create(errno.into())),
        }
        let c_name = CString::new(name).map_err(|error| create(error.into()))?;
        let index = nix::net::if_::if_nametoindex(c_name.as_c_str())
            .map_err(|errno| create(errno.into()))?;
        Ok(Self {
            device: Some(device),
            name: name.to_owned(),
            index,
        })
    }

    /// The tap that a QEMU holds whose launcher is dead, if it is that one still.
    pub(crate) fn adopt(name: &str, index: u32) -> Result<Self, TapError> {
        if nix::net::if_::if_nametoindex(name) != Ok(index) {
            return Err(TapError::Gone(name.to_owned()));
        }
        Ok(Self {
            device: None,
            name: name.to_owned(),
            index,
        })
    }

    /// The interface's index.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// A second descriptor of it, for QEMU.
    pub(crate) fn handle(&self) -> Result<OwnedFd, TapError> {
        let device = self.device()?.try_clone();
        device.map(OwnedFd::from).map_err(|source| TapError::Io {
            action: "hand on",
            name: self.name.clone(),
            source,
        })
    }

    /// Brings the tap up with `gateway` on the host's side and `guest`, at `guest_mac`, behind it.
    /// The neighbour is permanent, so the host never asks the guest's network who has an address.
    pub(crate) async fn bring_up(
        &self,
        gateway: Ipv4Addr,
        guest: Ipv4Addr,
        guest_mac: Mac,
    ) -> Result<(), TapError> {
        let netlink = Netlink::open()?;
        let handle = &netlink.handle;
        let address = handle.address().add(self.index, IpAddr::V4(gateway), 32);
        self.checked("set the gateway's address", address.execute().await)?;
        let up = LinkUnspec::new_with_index(self.index).up().build();
        self.checked("set the link up", handle.link().set(up).execute().await)?;
        let neighbour = handle
            .neighbours()
            .add(self.index, IpAddr::V4(guest))
            .link_layer_address(&guest_mac.0)
            .replace();
        self.checked("add the guest's neighbour entry", neighbour.execute().await)?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(guest, 32)
            .output_interface(self.index)
            .pref_source(gateway)
            .scope(netlink_packet_route::route::RouteScope::Link)
            .build();
        match handle.route().add(route).execute().await {
            Err(rtnetlink::Error::NetlinkError(error))
                if error.code.is_some_and(|code| code.get() == -libc::EEXIST) =>
            {
                Err(TapError::AddressTaken {
                    name: self.name.clone(),
                    address: guest,
                })
            }
            added => self.checked("add the guest's route", added),
        }
    }

    /// Closes the tap and waits, blocking the thread, until the interface is gone or `deadline` has
    /// passed; gives whether it is gone. The last close removes it, and that need not be this one:
    /// a child that another thread has just forked holds every descriptor until its exec.
    pub(crate) fn remove(self, deadline: Duration) -> bool {
        let Self {
            device,
            name,
            index,
        } = self;
        drop(device);
        let until = Instant::now() + deadline;
        while nix::net::if_::if_nametoindex(name.as_str()) == Ok(index) {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Sends `frame` as the guest would.
    pub(crate) fn send_as_guest(&self, frame: &[u8]) -> Result<(), TapError> {
        let written = nix::unistd::write(self.device()?, frame)
            .map_err(|errno| self.io("send a frame into", errno.into()))?;
        if written == frame.len() {
            Ok(())
        } else {
            Err(self.io("send a whole frame into", io::ErrorKind::WriteZero.into()))
        }
    }

    fn device(&self) -> Result<&File, TapError> {
        let device = self.device.as_ref();
        device.ok_or_else(|| TapError::Gone(self.name.clone()))
    }

    fn set_sysctl(&self, family: &str, setting: &str, value: &str) -> Result<(), TapError> {
        // /proc/sys/net shows the calling thread's namespace: no detour through another thread.
        let root = Path::new("/proc/sys/net").join(family);
        if !root.exists() {
            return Ok(()); // a kernel without the family has nothing to switch off
        }
        let path = root.join("conf").join(&self.name).join(setting);
        std::fs::write(&path, value).map_err(|source| TapError::Sysctl { path, source })
    }

    fn checked<T>(
        &self,
        action: &'static str,
        result: Result<T, rtnetlink::Error>,
    ) -> Result<T, TapError> {
        result.map_err(|source| TapError::Configure {
            action,
            name: self.name.clone(),
            source,
        })
    }

    fn io(&self, action: &'static str, source: io::Error) -> TapError {
        TapError::Io {
            action,
            name: self.name.clone(),
            source,
        }
    }
}

/// An rtnetlink connection in the calling thread's namespace, closed when dropped.
struct Netlink {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Netlink {
    fn open() -> Result<Self, TapError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(TapError::Netlink)?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
