//! The page that a consumer serves through its tunnel.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use omerta_test_support::Namespace;

/// A web server with one page, until it is dropped.
pub struct Page {
    ending: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

/// The last line of a download that has no end before it is told to have one.
pub const THE_END: &str = "the end";
/// What such a download sends at a time, and how long it rests then.
const PIECE: usize = 16 << 10;
const REST: Duration = Duration::from_millis(50);

impl Page {
    /// Serves `text` at an address of `namespace`.
    pub fn serve(namespace: &Namespace, at: SocketAddrV4, text: &str) -> Result<Self> {
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
            text.len()
        );
        Self::answering(namespace, at, move |visitor| {
            visitor.write_all(answer.as_bytes())
        })
    }

    /// Serves a download that goes on until `over`.
    pub fn download(
        namespace: &Namespace,
        at: SocketAddrV4,
        over: Arc<AtomicBool>,
    ) -> Result<Self> {
        Self::answering(namespace, at, move |visitor| {
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n";
            visitor.write_all(head.as_bytes())?;
            let piece = [&[b'.'; PIECE - 1][..], b"\n"].concat();
            while !over.load(Ordering::Relaxed) {
                visitor.write_all(&piece)?;
                thread::sleep(REST);
            }
            visitor.write_all(format!("{THE_END}\n").as_bytes())
        })
    }

    fn answering(
        namespace: &Namespace,
        at: SocketAddrV4,
        answer: impl Fn(&mut TcpStream) -> std::io::Result<()> + Send + 'static,
    ) -> Result<Self> {
        let listener = namespace
            .enter(|| TcpListener::bind(at))?
            .with_context(|| format!("cannot serve a page at {at}"))?;
        listener
            .set_nonblocking(true)
            .with_context(|| format!("cannot serve a page at {at}"))?;
        let ending = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&ending);
        let server = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                match listener.accept() {
                    // A visitor who goes away early is no matter.
                    Ok((visitor, _)) => drop(give(visitor, &answer)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        thread::sleep(Duration::from_millis(10))
                    }
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            }
        });
        Ok(Self {
            ending,
            server: Some(server),
        })
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            // The thread ends by itself; that it panicked would change nothing here.
            let _ = server.join();
        }
    }
}

fn give(
    mut visitor: TcpStream,
    answer: &impl Fn(&mut TcpStream) -> std::io::Result<()>,
) -> std::io::Result<()> {
    visitor.set_nonblocking(false)?;
    visitor.set_read_timeout(Some(Duration::from_secs(2)))?;
    // A tunnel whose other end moves stands still for a moment.
    visitor.set_write_timeout(Some(Duration::from_secs(20)))?;
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < 8192 {
        match visitor.read(&mut piece)? {
            0 => break,
            length => request.extend_from_slice(piece.get(..length).unwrap_or_default()),
        }
    }
    answer(&mut visitor)
}
