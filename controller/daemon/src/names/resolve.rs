//! Asking for a name's addresses.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use hickory_resolver::Resolver;
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;
use tokio::time::timeout;

use super::judge::Forbidden;
use super::{NameSettings, OwnNetworks};
use crate::pool::GuestPool;

/// The name servers of the host.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More of it is not read.
const MOST_CONF: u64 = 64 << 10;
/// How long one server may take to answer, and all of them together.
const ONE: Duration = Duration::from_secs(2);
const ALL: Duration = Duration::from_secs(10);
/// More addresses than any name needs are not looked at.
const MOST_ADDRESSES: usize = 32;

/// What a name was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Where the consumer may be, in the answer's order; one at least.
    pub(crate) addresses: Vec<Ipv4Addr>,
    /// For how long that holds.
    pub(crate) ttl: Duration,
}

/// Why a name leads nowhere.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NameError {
    #[error("cannot read {RESOLV_CONF}, which names whom to ask: name `nameservers` in [names]")]
    Conf(#[source] io::Error),
    #[error("nobody can be asked: {RESOLV_CONF} has no nameserver, and [names] none either")]
    NoServer,
    #[error("it is not answered")]
    Unanswered(#[source] NetError),
    #[error("it is not answered within {} s", ALL.as_secs())]
    Slow,
    #[error("it has no IPv4 address, which guests' tunnels need")]
    NoAddress,
    #[error("it leads to {0}, which {1}")]
    Forbidden(Ipv4Addr, #[source] Forbidden),
    #[error("the networks of this host's interfaces, where it must not lead, cannot be read")]
    Own(#[source] nix::errno::Errno),
}

impl NameSettings {
    /// Where a host by name may be reached now. Addresses where no consumer may be are left out; where only such are left, it
    /// leads nowhere.
    pub(crate) async fn resolve(&self, host: &str, pool: GuestPool) -> Result<Answer, NameError> {
        let asking = timeout(ALL, self.ask(host));
        let Answer { addresses, ttl } = asking.await.map_err(|_| NameError::Slow)??;
        let own = OwnNetworks::now().map_err(NameError::Own)?;
        let judged = |address: &Ipv4Addr| own.judge(*address, self, pool);
        let first = *addresses.first().ok_or(NameError::NoAddress)?;
        let forbidden = judged(&first);
        let addresses: Vec<Ipv4Addr> = addresses
            .into_iter()
            .filter(|address| judged(address).is_ok())
            .collect();
        match forbidden {
            Err(why) if addresses.is_empty() => Err(NameError::Forbidden(first, why)),
            _ => Ok(Answer { addresses, ttl }),
        }
    }

    async fn ask(&self, host: &str) -> Result<Answer, NameError> {
        let servers = match self.nameservers.as_slice() {
            [] => nameservers_of(&read_conf().map_err(NameError::Conf)?),
            named => named.to_vec(),
        };
        if servers.is_empty() {
            return Err(NameError::NoServer);
        }
        let servers = servers.iter().map(|server| {
            let mut config = NameServerConfig::udp_and_tcp(server.ip());
            for connection in &mut config.connections {
                connection.port = server.port();
            }
            config
        });
        let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
        let options = builder.options_mut();
        options.timeout = ONE;
        options.attempts = 1;
        // A name is the consumer's; what the provider calls its own machines is none of its business.
        options.use_hosts_file = ResolveHosts::Never;
        options.cache_size = 0;
        options.case_randomization = true;
        let resolver = builder.build().map_err(NameError::Unanswered)?;
        // With the dot no search list applies.
        let found = resolver.ipv4_lookup(format!("{host}.")).await;
        let found = found.map_err(|error| match error.is_no_records_found() {
            true => NameError::NoAddress,
            false => NameError::Unanswered(error),
        })?;
        let records = found.answers();
        let addresses = records.iter().filter_map(|record| match record.data {
            RData::A(address) => Some(address.0),
            _ => None,
        });
        let ttl = records.iter().map(|record| record.ttl).min().unwrap_or(0);
        Ok(Answer {
            addresses: addresses.take(MOST_ADDRESSES).collect(),
            ttl: Duration::from_secs(ttl.into()),
        })
    }
}

fn read_conf() -> io::Result<String> {
    let mut text = Vec::new();
    File::open(RESOLV_CONF)?
        .take(MOST_CONF)
        .read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The servers that a resolv.conf names. Its search list and options are not for names that are whole.
fn nameservers_of(conf: &str) -> Vec<SocketAddr> {
    let lines = conf.lines().map(str::split_whitespace);
    lines
        .filter_map(|mut words| match (words.next(), words.next()) {
            (Some("nameserver"), Some(address)) => address.parse::<IpAddr>().ok(),
            _ => None,
        })
        .map(|address| SocketAddr::new(address, 53))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_a_resolv_conf_are_its_nameserver_lines() {
        let conf = "# nameserver 192.0.2.9\nsearch example.org\nnameserver 192.0.2.1 # the first\n\
            nameserver\t2001:db8::1\nnameserver here\noptions ndots:2\n";
        let servers: Vec<String> = nameservers_of(conf)
            .iter()
            .map(SocketAddr::to_string)
            .collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
    }
}
