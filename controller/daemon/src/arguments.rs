//! The command line of omertad.

use std::path::PathBuf;

use clap::Parser;

use crate::config::Config;

/// Runs guests, keeps their guards, exports metrics.
///
/// omertad works in the network namespace it is started in. Options given here win over the
/// configuration file.
#[derive(Debug, Parser)]
#[command(name = "omertad", version)]
pub(crate) struct Arguments {
    /// Read the configuration from this TOML file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Listen for the API on this unix socket [default: /run/omerta/omertad.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Keep what outlives a restart here [default: /var/lib/omerta].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Keep guests' sockets and logs here [default: /run/omerta].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Boot images from here too, one directory each, signed or not, before those of the store.
    #[arg(long, value_name = "DIR")]
    image_dir: Option<PathBuf>,
    /// Serve metrics on this address, or `off` [default: 127.0.0.1:9469].
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<String>,
    /// Give guests addresses from this network [default: 10.77.0.0/16].
    #[arg(long, value_name = "NETWORK")]
    guest_pool: Option<String>,
    /// What rogue traffic does to a guest that does not say: drop, alert, pause or terminate
    /// [default: terminate].
    #[arg(long, value_name = "POLICY")]
    on_violation: Option<String>,
    /// How guests execute: auto, kvm or tcg [default: auto].
    #[arg(long, value_name = "ACCEL")]
    accel: Option<String>,
    /// On which machine of QEMU's: auto, q35 or microvm [default: auto].
    #[arg(long, value_name = "MACHINE")]
    machine: Option<String>,
    /// Let at most this many guests live at once [default: 256].
    #[arg(long, value_name = "N")]
    max_guests: Option<usize>,
}

impl Arguments {
    /// The configuration with what the command line says laid over it.
    pub(crate) fn over(self, config: Config) -> Config {
        Config {
            socket: self.socket.or(config.socket),
            state_dir: self.state_dir.or(config.state_dir),
            run_dir: self.run_dir.or(config.run_dir),
            image_dir: self.image_dir.or(config.image_dir),
            images: config.images,
            recovery: config.recovery,
            tunnel: config.tunnel,
            names: config.names,
            agent: config.agent,
            rogue: config.rogue,
            incidents: config.incidents,
            metrics: self.metrics.or(config.metrics),
            guest_pool: self.guest_pool.or(config.guest_pool),
            uplinks: config.uplinks,
            uplink_hook: config.uplink_hook,
            redirect: config.redirect,
            on_violation: self.on_violation.or(config.on_violation),
            accel: self.accel.or(config.accel),
            machine: self.machine.or(config.machine),
            max_guests: self.max_guests.or(config.max_guests),
            max_vcpus: config.max_vcpus,
            memory_reserve_mib: config.memory_reserve_mib,
            limits: config.limits,
            jail: config.jail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_over_the_file() {
        let arguments = Arguments::parse_from(["omertad", "--metrics", "off"]);
        let config = Config {
            metrics: Some("127.0.0.1:1".into()),
            accel: Some("tcg".into()),
            ..Config::default()
        };
        let merged = arguments.over(config);
        assert_eq!(merged.metrics.as_deref(), Some("off"));
        assert_eq!(merged.accel.as_deref(), Some("tcg"));
    }
}
