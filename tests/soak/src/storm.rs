//! Good and hostile traffic through a real tap while a controller flips the policy, or is killed
//! doing so.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use omerta_dataplane::Guard;
use omerta_kernel_tests::{
    CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, STRANGER, config, ethernet, udp,
};
use omerta_test_support::{Capture, Namespace, Tap, Veth};
use omerta_verdict::{Endpoint, Mode, Reason};

const TAP: &str = "guest";
const WORLD_MAC: &str = "52:54:00:00:00:cc";
/// On every version of the policy.
const ALWAYS: &str = "udp:192.0.2.10:51820";
/// On one version each.
const SOMETIMES: [&str; 2] = ["udp:192.0.2.10:1001", "udp:192.0.2.10:1002"];
/// Frames between two looks at what has arrived.
const BATCH: u32 = 64;
const PATIENCE: Duration = Duration::from_secs(5);

fn lists() -> anyhow::Result<[Vec<Endpoint>; 2]> {
    let list =
        |port: &str| -> anyhow::Result<Vec<Endpoint>> { Ok(vec![ALWAYS.parse()?, port.parse()?]) };
    Ok([list(SOMETIMES[0])?, list(SOMETIMES[1])?])
}

/// How often the policy flips between two upgrades.
const FLIPS: usize = 50;

/// The controller: flips the policy of the current namespace's tap, and every now and then puts other
/// programs into its guard, until it is killed.
///
/// # Errors
/// Where the guard is not in force.
pub fn flip_without_end() -> anyhow::Result<()> {
    let lists = lists()?;
    for turn in 0.. {
        for list in &lists {
            Guard::open(TAP)?.replace(list)?;
        }
        if turn % FLIPS == 0 {
            Guard::open(TAP)?.upgrade()?;
        }
    }
    Ok(())
}

/// A provider with one guarded tap and an uplink, and what has passed so far.
pub struct Storm {
    provider: Arc<Namespace>,
    _world: Namespace,
    tap: Tap,
    arrivals: Capture,
    random: fastrand::Rng,
    number: u32,
    good: u64,
    hostile: u64,
    sometimes: [u64; 2],
    kills: u64,
    epoch: u64,
}

impl Storm {
    /// Makes the network.
    ///
    /// # Errors
    /// Without root.
    pub fn new() -> anyhow::Result<Self> {
        let (provider, world) = (Namespace::new("os-prov")?, Namespace::new("os-world")?);
        for namespace in [&provider, &world] {
            namespace.disable_ipv6()?;
        }
        provider.enable_forwarding()?;
        Veth::across((&provider, "uplink"), (&world, "inet"))?;
        let tap = provider.enter(|| Tap::create(TAP))??;
        provider.ip(&format!("link set {TAP} address {GATEWAY_MAC}"))?;
        let mut guard = config(Mode::Filtered);
        guard.allow = lists()?[0].clone();
        provider.enter(|| Guard::attach(TAP, &guard).map(drop))??;
        provider.enter(|| tap.up())??;
        world.ip("link set inet up")?;
        for step in [
            "link set uplink up",
            "addr add 10.77.0.1/32 dev guest",
            "route add 10.77.0.2/32 dev guest",
            "addr add 203.0.113.1/24 dev uplink",
            "route add default via 203.0.113.9",
            &format!("neigh replace 203.0.113.9 lladdr {WORLD_MAC} dev uplink nud permanent"),
        ] {
            provider.ip(step)?;
        }
        let arrivals = world.enter(|| Capture::open("inet"))??;
        Ok(Self {
            provider: Arc::new(provider),
            _world: world,
            tap,
            arrivals,
            random: fastrand::Rng::new(),
            number: 0,
            good: 0,
            hostile: 0,
            sometimes: [0; 2],
            kills: 0,
            epoch: 1,
        })
    }

    /// Traffic until then, under `controller --controller`.
    ///
    /// # Errors
    /// At the first frame that passes and must not, or does not and must.
    pub fn run(&mut self, controller: &Path, until: Instant) -> anyhow::Result<()> {
        let mut child = Controller::start(&self.provider, controller)?;
        while Instant::now() < until {
            self.batch()?;
            ensure!(child.runs()?, "the controller has ended by itself");
        }
        drop(child);
        self.epoch = expect_one_of_two_policies(&self.provider, self.epoch)?;
        Ok(())
    }

    /// As [`Storm::run`], but until `most` controllers were killed at the latest: each at a random
    /// instant, in the middle of the traffic, which goes on without one until the next takes over.
    ///
    /// # Errors
    /// As [`Storm::run`].
    pub fn run_killing(
        &mut self,
        controller: &Path,
        until: Instant,
        most: u64,
    ) -> anyhow::Result<()> {
        let provider = Arc::clone(&self.provider);
        let (done, epoch) = (AtomicBool::new(false), self.epoch);
        let (kills, epoch) = thread::scope(|scope| {
            let killer = scope.spawn(|| {
                let killed = kill_until(&provider, controller, most, epoch, &done);
                done.store(true, Ordering::Relaxed);
                killed
            });
            while !done.load(Ordering::Relaxed) && Instant::now() < until {
                if let Err(wrong) = self.batch() {
                    done.store(true, Ordering::Relaxed);
                    return Err(wrong);
                }
            }
            done.store(true, Ordering::Relaxed);
            killer
                .join()
                .unwrap_or_else(|_| bail!("the killer panicked"))
        })?;
        self.kills += kills;
        self.epoch = epoch;
        Ok(())
    }

    /// One batch: half of it must pass, a quarter must not, a quarter may.
    fn batch(&mut self) -> anyhow::Result<()> {
        let before = self.counted()?;
        let mut due = Vec::new();
        for index in 0..BATCH {
            self.number = self.number.wrapping_add(1);
            let payload = self.number.to_be_bytes();
            let (to, port) = match index % 4 {
                0 | 2 => {
                    due.push(self.number);
                    (CONSUMER, CONSUMER_PORT)
                }
                1 if self.random.bool() => (STRANGER, CONSUMER_PORT),
                1 => (CONSUMER, 53),
                _ => (CONSUMER, if self.random.bool() { 1001 } else { 1002 }),
            };
            let packet = Ipv4::new(GUEST, to, 17).packet(&udp(40000, port, &payload));
            self.tap
                .send(&ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet))?;
        }
        self.good += due.len() as u64;
        self.hostile += u64::from(BATCH / 4);
        let after = self.counted()?;
        let [allowed, dropped] = [after[0] - before[0], after[1] - before[1]];
        ensure!(
            allowed + dropped == u64::from(BATCH),
            "{allowed} allowed and {dropped} dropped of {BATCH}"
        );
        self.expect_arrivals(due, allowed)
    }

    /// Allowed, and dropped for the endpoint.
    fn counted(&self) -> anyhow::Result<[u64; 2]> {
        let counters = self.provider.enter(|| Guard::open(TAP)?.counters())??;
        let rx = counters.egress.rx().packets;
        let seen = [
            counters.egress.allowed.packets,
            counters.egress.dropped_for(Reason::Endpoint).packets,
        ];
        ensure!(
            seen[0] + seen[1] == rx,
            "a frame was dropped for another reason than its endpoint"
        );
        Ok(seen)
    }

    fn expect_arrivals(&mut self, mut due: Vec<u32>, allowed: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut arrived = 0;
        while (!due.is_empty() || arrived < allowed) && Instant::now() < deadline {
            for frame in self.arrivals.frames()? {
                let bytes = frame.bytes;
                let port = bytes.get(36..38).context("a frame of nobody arrives")?;
                let number = bytes.get(42..46).context("a frame of nobody arrives")?;
                let number = u32::from_be_bytes(number.try_into()?);
                arrived += 1;
                match (
                    bytes.get(30..34) == Some(&CONSUMER.octets()),
                    u16::from_be_bytes(port.try_into()?),
                ) {
                    (true, CONSUMER_PORT) => due.retain(|waiting| *waiting != number),
                    (true, 1001) => self.sometimes[0] += 1,
                    (true, 1002) => self.sometimes[1] += 1,
                    _ => bail!("LEAKED: {bytes:02x?}"),
                }
            }
        }
        ensure!(
            due.is_empty(),
            "LOST: {} allowed frames, the first {}",
            due.len(),
            due[0]
        );
        ensure!(
            arrived == allowed,
            "{arrived} frames arrived, the guard allowed {allowed}"
        );
        ensure!(self.arrivals.lost()? == 0, "the capture lost frames");
        Ok(())
    }

    /// Controllers killed.
    pub fn kills(&self) -> u64 {
        self.kills
    }

    /// Whether both versions of the policy were seen in force.
    pub fn has_flipped(&self) -> bool {
        self.sometimes.iter().all(|passed| *passed > 0)
    }

    /// What has passed, in words.
    pub fn summary(&self) -> String {
        format!(
            "{} good frames, 0 lost; {} hostile, 0 leaked; {} policies; {} controllers killed",
            self.good, self.hostile, self.epoch, self.kills
        )
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        // Pins outlive the namespace; what failed before has more to say than this.
        let _ = self
            .provider
            .enter(|| Guard::open(TAP).and_then(Guard::detach));
    }
}

/// Starts controllers and kills each at a random instant, until `done` or `most` are dead: how many
/// were killed, and the epoch then.
fn kill_until(
    provider: &Namespace,
    program: &Path,
    most: u64,
    mut epoch: u64,
    done: &AtomicBool,
) -> anyhow::Result<(u64, u64)> {
    let mut random = fastrand::Rng::new();
    let mut kills = 0;
    while kills < most && !done.load(Ordering::Relaxed) {
        let mut child = Controller::start(provider, program)?;
        thread::sleep(Duration::from_micros(random.u64(..200_000)));
        ensure!(child.runs()?, "the controller has ended by itself");
        drop(child);
        kills += 1;
        epoch = expect_one_of_two_policies(provider, epoch)?;
        thread::sleep(Duration::from_micros(random.u64(..20_000)));
    }
    Ok((kills, epoch))
}

/// What a controller that is gone has left: one of the two policies, whole, and no older one than
/// that of epoch `before`. The epoch.
fn expect_one_of_two_policies(provider: &Namespace, before: u64) -> anyhow::Result<u64> {
    let guard = provider.enter(|| {
        let guard = Guard::open(TAP)?;
        guard.verify()?;
        guard.status()
    })??;
    let right = guard.allow.len() == 2
        && guard.allow.iter().any(|endpoint| endpoint == ALWAYS)
        && guard
            .allow
            .iter()
            .any(|endpoint| SOMETIMES.contains(&endpoint.as_str()));
    ensure!(right, "a policy that nobody has made: {:?}", guard.allow);
    ensure!(
        guard.epoch >= before,
        "the epoch went back to {}",
        guard.epoch
    );
    Ok(guard.epoch)
}

/// A controller at work; killed when dropped.
struct Controller(Child);

impl Controller {
    fn start(provider: &Namespace, program: &Path) -> anyhow::Result<Self> {
        let start = || {
            let mut command = Command::new(program);
            command.arg("--controller").stdin(Stdio::null()).spawn()
        };
        let child = provider
            .enter(start)?
            .context("cannot start the controller")?;
        Ok(Self(child))
    }

    fn runs(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // SIGKILL; a child that is gone already is reaped all the same.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
