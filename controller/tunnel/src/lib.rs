//! WireGuard devices: keys and `.conf` files, which peers are wanted, and the smallest change from what a device has to
//! that; and the devices themselves, the kernel's or
//! wireguard-go's, behind one trait ([`Device`]).
//!
//! [`Peers`], [`plan`] and [`Roaming`] do no I/O. Secrets ([`Secret`]) are wiped when they are dropped, and nothing here prints one.

mod allowed_ip;
mod conf;
mod device;
mod endpoint;
mod handshakes;
mod health;
mod host;
mod kernel;
mod namespace;
mod netlink;
mod peer;
mod plan;
mod public_key;
mod roaming;
mod secret;
mod uapi;
mod userspace;

pub use allowed_ip::{AllowedIp, AllowedIpError};
pub use conf::{Conf, ConfError, ConfPeer, Ignored, Interface, Problem};
pub use device::{Device, DeviceError, PeerStatus, Setup, Status};
pub use endpoint::{PeerEndpoint, PeerEndpointError};
pub use handshakes::Handshakes;
pub use health::{Health, Silence, Turn};
pub use host::{HostTunnel, HostTunnelError, Plan};
pub use kernel::Kernel;
pub use namespace::Namespace;
pub use peer::{Conflict, Peer, Peers};
pub use plan::{Addresses, Change, Update, plan};
pub use public_key::{PublicKey, PublicKeyError};
pub use roaming::{Roaming, TooOften};
pub use secret::{Secret, SecretError};
pub use userspace::Userspace;
