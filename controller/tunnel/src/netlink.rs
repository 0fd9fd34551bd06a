//! Requests to the kernel by netlink, one at a time.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_sys::{Socket, SocketAddr};
use zeroize::Zeroizing;

use crate::Namespace;

/// The kernel answers at once; one that does not is not waited for.
const ANSWER: Duration = Duration::from_secs(5);

/// A socket to one part of the kernel.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Has something done.
    pub(crate) fn change<T>(
        &mut self,
        message: impl Into<NetlinkMessage<T>>,
        flags: u16,
    ) -> io::Result<()>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        self.exchange(message.into(), NLM_F_REQUEST | NLM_F_ACK | flags)
            .map(drop)
    }

    /// Moves an interface from this socket's network namespace to another.
    pub(crate) fn move_link(&mut self, interface: &str, to: &Namespace) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(interface.to_owned()),
            LinkAttribute::NetNsFd(to.as_raw_fd()),
        ];
        self.change(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Asks for all there is.
    pub(crate) fn dump<T>(&mut self, message: impl Into<NetlinkMessage<T>>) -> io::Result<Vec<T>>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        self.exchange(message.into(), NLM_F_REQUEST | NLM_F_DUMP)
    }

    /// Asks for one thing.
    pub(crate) fn get<T>(&mut self, message: impl Into<NetlinkMessage<T>>) -> io::Result<Vec<T>>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        self.exchange(message.into(), NLM_F_REQUEST | NLM_F_ACK)
    }

    fn exchange<T>(&mut self, mut message: NetlinkMessage<T>, flags: u16) -> io::Result<Vec<T>>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        self.sequence = self.sequence.wrapping_add(1);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        // It may hold keys.
        let mut bytes = Zeroizing::new(vec![0; message.buffer_len()]);
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        let end = Instant::now() + ANSWER;
        loop {
            let datagram = Zeroizing::new(self.receive(end)?);
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let length = NetlinkBuffer::new_checked(rest)
                    .map_err(io::Error::other)?
                    .length() as usize;
                let message = NetlinkMessage::<T>::deserialize(rest).map_err(io::Error::other)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(answers),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    fn receive(&mut self, end: Instant) -> io::Result<Vec<u8>> {
        loop {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => return Ok(bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(error) => return Err(error),
            }
        }
    }
}
