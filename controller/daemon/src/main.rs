//! omertad: runs guests, keeps their guards, exports metrics.
#![deny(unsafe_code)]

mod acceleration;
mod arguments;
mod cases;
mod clock;
mod config;
mod connections;
mod console_silence;
mod evidence;
mod exporter;
mod failure;
mod fleet;
mod guest_start;
mod guest_task;
mod host_memory;
mod host_tunnel;
mod images;
mod incidents;
mod instance;
mod journal;
mod log;
mod lookups;
mod made_directories;
mod memory;
mod metrics;
mod names;
mod order;
mod order_words;
mod outside;
mod peers;
mod pool;
mod pool_claim;
mod preflight;
mod probed;
mod quiet;
mod record;
mod recovery;
mod room;
mod roster;
mod server;
mod steering;
mod store;
mod sweep;
mod tap_name;
mod tunnel_health;
mod watch;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use omerta_dataplane::{Prepared, Uplink};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch as notice;
use tracing_subscriber::EnvFilter;

use crate::arguments::Arguments;
use crate::config::{Config, OnStop, Settings};
use crate::fleet::Fleet;
use crate::incidents::Incidents;
use crate::instance::Instance;
use crate::journal::Journal;
use crate::log::Log;
use crate::pool::Slot;
use crate::pool_claim::PoolClaim;
use crate::store::{Contents, Store};
use crate::sweep::OWNER;

/// How long open connections have to finish once the guests are gone.
const CONNECTIONS_DEADLINE: Duration = Duration::from_secs(1);
/// Threads for tasks: enough that one that waits for the kernel keeps no guest's pause waiting.
const MIN_THREADS: usize = 4;
/// Threads for blocking work that is no guest's start or end.
const SPARE_THREADS: usize = 64;

fn main() -> ExitCode {
    let is_bounded = memory::bound();
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("OMERTA_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = match Log::begin() {
        Ok(log) => log,
        Err(error) => {
            eprintln!("omertad: cannot start the thread that writes the log: {error}");
            return ExitCode::FAILURE;
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(log.clone())
        .init();
    if !is_bounded {
        tracing::warn!("glibc does not bound what it keeps of free memory");
    }
    match start(arguments) {
        Ok(()) => {
            log.end(None);
            ExitCode::SUCCESS
        }
        Err(error) => {
            let complaint = format!("omertad: {}", failure::report(error.as_ref()));
            log.end(Some(&complaint));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// 2 where the command line or the configuration is wrong, 1 otherwise.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<config::ConfigError>() {
        2
    } else {
        1
    }
}

fn start(arguments: Arguments) -> anyhow::Result<()> {
    let config = match &arguments.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    let settings = arguments.over(config).validate()?;
    preflight::check()?;
    preflight::raise_descriptor_limit()?;
    let instance = Instance::claim(&settings.socket, &settings.run_dir)?;
    let pool = PoolClaim::take(settings.guest_pool)?;
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .max(MIN_THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        // A guest that starts or ends keeps one for that time, however long it is.
        .max_blocking_threads(2 * settings.max_guests + SPARE_THREADS)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(serve(&settings, &instance, &pool));
    if matches!(outcome, Ok(Outcome::GuestsLeft)) {
        // As if killed, which loses nothing: what is dropped would undo itself.
        std::mem::forget(runtime);
        return Ok(());
    }
    // Nothing that still runs has anything left to say.
    runtime.shutdown_timeout(CONNECTIONS_DEADLINE);
    outcome.map(drop)
}

/// How omertad's work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    GuestsEnded,
    /// They live on, and must not end with their tasks.
    GuestsLeft,
}

async fn serve(
    settings: &Settings,
    instance: &Instance,
    pool: &PoolClaim,
) -> anyhow::Result<Outcome> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let metrics_listener = match settings.metrics {
        Some(address) => Some(exporter::listen(address).await?),
        None => None,
    };
    let (store, contents) = Store::open(&settings.state_dir)?;
    hold_addresses(pool, &contents)?;
    let (incidents, cases) = Incidents::open(&settings.state_dir, settings.incidents)?;
    let listener = UnixListener::from_std(instance.listen()?).context("cannot use the socket")?;
    let journal = Arc::new(Journal::new());
    // Also where the store was moved away: cases are named by guests' numbers.
    let first = contents.first_free.max(cases.first_free());
    let uplink = match settings.uplinks.as_slice() {
        [] => None,
        uplinks => {
            let attached = Uplink::attach(uplinks, settings.uplink_hook);
            Some(attached.context("cannot drop early at the uplinks")?)
        }
    };
    let programs = match OWNER.parse().map(|owner| Prepared::new(Some(&owner))) {
        Ok(Ok(programs)) => Some(Arc::new(programs)),
        Ok(Err(error)) => {
            // The first guest's guard says so again.
            let error = failure::report(&error);
            tracing::warn!("the guards' programs cannot be loaded: {error}");
            None
        }
        Err(error) => bail!("{error}"),
    };
    if let Some(programs) = programs.clone() {
        tokio::spawn(async move {
            let Err(error) = watch::log_diagnostics(&programs).await;
            let error = failure::report(&error);
            tracing::warn!("what the guards' programs say is not logged: {error}");
        });
    }
    let fleet = Fleet::new(settings.clone(), journal, store, incidents, first).dropping_at(uplink);
    let fleet = Arc::new(fleet);
    // From here on nothing fails: what is taken over ends only when it is told to.
    recovery::recover(&fleet, contents.guests, contents.broken, cases).await;
    sweep::sweep(&settings.run_dir, &fleet.taps());
    omerta_vm_launcher::sweep_jails(&settings.jail);
    fleet.warn_if_short();
    tracing::info!(
        socket = %settings.socket.display(),
        metrics = metrics_address(metrics_listener.as_ref()),
        "omertad {} is ready",
        env!("CARGO_PKG_VERSION"),
    );
    let (probing, images) = (Arc::clone(&fleet), settings.images.clone());
    tokio::spawn(async move {
        probing.acceleration().find(images).await;
    });
    tokio::spawn(outside::watch(Arc::clone(&fleet)));
    if let Some(events) = fleet.journal().numbers() {
        tokio::spawn(memory::give_back(events));
    }

    let (stop, stopped) = notice::channel(false);
    let api = server::serve(listener, Arc::clone(&fleet), stopped.clone());
    let api = tokio::spawn(api);
    let exporter = metrics_listener
        .map(|listener| tokio::spawn(exporter::serve(listener, Arc::clone(&fleet), stopped)));

    let signal = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    if settings.on_stop == OnStop::Keep {
        tracing::info!(signal, "leaving every guest to the next omertad");
        fleet.incidents().finish();
        return Ok(Outcome::GuestsLeft);
    }
    tracing::info!(signal, "ending every guest");
    let left = fleet.shut_down().await;
    fleet.incidents().finish();
    // The receivers live in the servers; they may have ended already.
    let _ = stop.send(true);
    let servers = async {
        let _ = api.await;
        if let Some(exporter) = exporter {
            let _ = exporter.await;
        }
    };
    let _ = tokio::time::timeout(CONNECTIONS_DEADLINE, servers).await;
    if left > 0 {
        bail!("of {left} guests something is left: see the log for what to remove by hand");
    }
    tracing::info!("every guest has ended");
    Ok(Outcome::GuestsEnded)
}

/// Claims the addresses of guests of an omertad before, which may be of another pool than the one that is configured.
fn hold_addresses(pool: &PoolClaim, contents: &Contents) -> anyhow::Result<()> {
    let whole = contents.guests.iter().map(|kept| kept.grant.slot);
    let broken = contents.broken.iter().filter_map(|broken| broken.slot);
    for slot in whole.chain(broken).map(Slot) {
        if !pool.hold(slot)? {
            let address = slot.addresses().guest;
            tracing::error!(%address, "another omertad has given out a guest's address that one of the store has: end one of the two");
        }
    }
    Ok(())
}

/// Where metrics are served, for the log: a configured port 0 has become another.
fn metrics_address(listener: Option<&TcpListener>) -> String {
    match listener.map(TcpListener::local_addr) {
        Some(Ok(address)) => address.to_string(),
        Some(Err(error)) => error.to_string(),
        None => "off".to_owned(),
    }
}
