//! Devices that wireguard-go drives: for kernels without WireGuard.
//!
//! It runs as a user of its own, with the right to configure the network of the namespace that it is started in and no
//! other right. It is given the socket that it is configured by, open, so it opens no file but `/dev/net/tun`, and no directory
//! is its own; root alone may speak to it. It opens the tunnel's UDP socket where it runs; the interface may be
//! moved elsewhere.

use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_ROUTE;

use crate::netlink::Netlink;
use crate::uapi::{Request, parse_status};
use crate::{Change, Device, DeviceError, Namespace, Setup, Status};

/// How long it may take to come.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// The longest answer: of some 100,000 peers.
const MOST: u64 = 64 << 20;

/// Becomes wireguard-go, which gets its socket (standard output) as descriptor 3. It watches the socket's name in the one place
/// that it knows, so a mount namespace of its own has it there, in a /var/run of its own: the host's may be read-only. Where
/// the host's `/dev/net/tun` is not everybody's, there is one that is. Its arguments are the socket's directory, the user, the
/// interface, what the end of the thread that began it means, and `own` for such a `/dev/net/tun`.
const START: &str = "cd \"$1\" && mount -t tmpfs -o mode=755,size=64k none /var/run && mkdir -m 755 /var/run/wireguard &&
    mount --no-canonicalize --bind . /var/run/wireguard && cd / &&
    { [ -z \"$5\" ] || { mount -t tmpfs -o mode=755,size=64k none /dev/net && mknod -m 666 /dev/net/tun c 10 200; }; } &&
    exec setpriv --reuid=\"$2\" --regid=\"$2\" --clear-groups --inh-caps=-all,+net_admin \\
        --ambient-caps=-all,+net_admin --bounding-set=-all,+net_admin --no-new-privs --pdeathsig=\"$4\" wireguard-go -f \"$3\" \\
        3<&1 >/dev/null";

/// A device that wireguard-go drives.
#[derive(Debug)]
pub struct Userspace {
    interface: String,
    directory: PathBuf,
    driver: Child,
    /// In the namespace that it was made in.
    route: Netlink,
}

impl Userspace {
    /// Makes the interface, down and without peers, in the network namespace of this thread. `directory` is made for its
    /// socket alone, and must not exist; `user` is whom nothing else runs as. Where it `ends_with_thread`, the driver is killed
    /// when this thread ends, however that comes about.
    ///
    /// # Errors
    /// See [`DeviceError`]. Nothing is left then.
    pub fn create(
        interface: &str,
        directory: &Path,
        user: u32,
        ends_with_thread: bool,
    ) -> Result<Self, DeviceError> {
        let at = |action| {
            let path = directory.to_owned();
            move |source| DeviceError::Path {
                action,
                path,
                source,
            }
        };
        let route = Netlink::open(NETLINK_ROUTE).map_err(|source| DeviceError::Refused {
            action: "ask the kernel about",
            interface: interface.to_owned(),
            source,
        })?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(directory)
            .map_err(at("create"))?;
        let started = listen(directory, interface)
            .map_err(at("listen in"))
            .and_then(|socket| start(interface, directory, socket, user, ends_with_thread));
        let driver = match started {
            Ok(driver) => driver,
            Err(error) => {
                let _ = fs::remove_dir_all(directory);
                return Err(error);
            }
        };
        let mut device = Self {
            interface: interface.to_owned(),
            directory: directory.to_owned(),
            driver,
            route,
        };
        // Dropped, it ends the driver and removes the directory.
        device.await_socket()?;
        device.drain();
        Ok(device)
    }

    /// The pid of the program that drives it.
    pub fn pid(&self) -> u32 {
        self.driver.id()
    }

    fn socket(&self) -> PathBuf {
        self.directory.join(format!("{}.sock", self.interface))
    }

    fn await_socket(&mut self) -> Result<(), DeviceError> {
        let end = Instant::now() + PATIENCE;
        loop {
            // The socket is there before whoever answers.
            if self.status().is_ok() {
                return Ok(());
            }
            let why = match self.driver.try_wait() {
                Ok(Some(status)) => format!("has ended ({status}): {}", self.last_words()),
                _ if Instant::now() > end => {
                    format!("has not come within {} s", PATIENCE.as_secs())
                }
                _ => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
            };
            return Err(DeviceError::Driver {
                interface: self.interface.clone(),
                why,
            });
        }
    }

    /// Reads what it says from here on, so that it never waits for a reader: strangers can make it complain.
    fn drain(&mut self) {
        if let Some(mut stderr) = self.driver.stderr.take() {
            std::thread::spawn(move || io::copy(&mut stderr, &mut io::sink()));
        }
    }

    /// The last line of what it said before it ended.
    fn last_words(&mut self) -> String {
        let mut said = Vec::new();
        if let Some(stderr) = self.driver.stderr.take() {
            let _ = stderr.take(4096).read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().rev().find(|line| !line.trim().is_empty());
        last.unwrap_or("it said nothing")
            .chars()
            .filter(|c| !c.is_control())
            .collect()
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(stream)
    }

    /// Asks, and gives the answer up to its empty line.
    fn ask(&self, action: &'static str, request: &[u8]) -> Result<String, DeviceError> {
        let ask = || {
            let mut stream = self.connect()?;
            stream.write_all(request)?;
            let mut reader = BufReader::new(stream.take(MOST));
            let mut answer = String::new();
            loop {
                match reader.read_line(&mut answer)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    1 => return Ok(answer),
                    _ => {}
                }
            }
        };
        ask().map_err(|source| self.refused(action, source))
    }

    fn set(&self, action: &'static str, request: Request) -> Result<(), DeviceError> {
        let answer = self.ask(action, request.end().as_bytes())?;
        match answer.trim_end().strip_prefix("errno=") {
            Some("0") => Ok(()),
            Some(number) => {
                // Negative, as kernels have them.
                let number = number.parse::<i32>().unwrap_or(0).wrapping_abs();
                Err(self.refused(action, io::Error::from_raw_os_error(number)))
            }
            None => Err(DeviceError::Answer {
                interface: self.interface.clone(),
                what: "no errno",
            }),
        }
    }

    fn refused(&self, action: &'static str, source: io::Error) -> DeviceError {
        DeviceError::Refused {
            action,
            interface: self.interface.clone(),
            source,
        }
    }
}

/// Whether everybody may make an interface, who has the right to: so udev has it.
fn tun_is_everybodys() -> bool {
    fs::metadata("/dev/net/tun").is_ok_and(|node| node.permissions().mode() & 0o006 == 0o006)
}

/// Makes the socket, to which root alone may write. The driver must be able to find it by name, and to read its inode: it
/// ends when the name is removed. What is above the directory keeps everybody else out.
fn listen(directory: &Path, interface: &str) -> io::Result<OwnedFd> {
    let path = directory.join(format!("{interface}.sock"));
    let socket = UnixListener::bind(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o644))?;
    fs::set_permissions(directory, Permissions::from_mode(0o711))?;
    Ok(socket.into())
}

fn start(
    interface: &str,
    directory: &Path,
    socket: OwnedFd,
    user: u32,
    ends_with_thread: bool,
) -> Result<Child, DeviceError> {
    Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            START,
            "sh",
        ])
        .arg(directory)
        .arg(user.to_string())
        .arg(interface)
        .arg(if ends_with_thread { "kill" } else { "keep" })
        .arg(if tun_is_everybodys() { "" } else { "own" })
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LOG_LEVEL", "error")
        .env("WG_UAPI_FD", "3")
        .stdin(Stdio::null())
        // No other program that is started meanwhile gets it.
        .stdout(socket)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| DeviceError::Program {
            program: "unshare",
            source,
        })
}

impl Device for Userspace {
    const BACK_END: &'static str = "userspace (wireguard-go)";

    fn interface(&self) -> &str {
        &self.interface
    }

    fn move_to(&mut self, namespace: &Namespace) -> Result<(), DeviceError> {
        let moved = self.route.move_link(&self.interface, namespace);
        moved.map_err(|source| self.refused("move", source))
    }

    fn set_up(&mut self, setup: &Setup) -> Result<(), DeviceError> {
        let mut request = Request::new();
        request.set_up(setup);
        self.set("configure", request)
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), DeviceError> {
        let mut changes = changes.iter().peekable();
        while changes.peek().is_some() {
            let mut request = Request::new();
            while !request.is_full()
                && let Some(change) = changes.next()
            {
                request.change(change);
            }
            self.set("change the peers of", request)?;
        }
        Ok(())
    }

    fn status(&mut self) -> Result<Status, DeviceError> {
        // It tells the private key, too.
        let answer = zeroize::Zeroizing::new(self.ask("look at", b"get=1\n\n")?);
        parse_status(answer.trim_end_matches('\n')).map_err(|what| DeviceError::Answer {
            interface: self.interface.clone(),
            what,
        })
    }
}

impl Drop for Userspace {
    fn drop(&mut self) {
        // The interface goes with its last descriptor.
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}
