//! `launch`: from `omerta vm run` to the guest's first word, against the same QEMU command without
//! jail, guard or controller; many guests at once; and what omertad and each QEMU take of the host.
//!
//! Two guests: one of a few instructions, which shows what is added, and the guest image, which shows
//! what that is beside a boot.

mod bare;
mod provider;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use omerta_test_support::write_bare_guest;

use crate::report::Bench;
use crate::rounds::{Case, Rounds, Samples};
pub use bare::Bare;
pub use provider::Provider;

/// Writes one line to the serial port and halts.
pub const SPEAKS: &[u8] = &[
    0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
    0xb0, b'h', 0xee, // mov al, 'h'; out dx, al
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
    0xf4, 0xeb, 0xfd, // hlt; jmp to it
];
/// What a guest says first: the one above, and the guest image's first process.
const TINY_WORD: &[u8] = b"h\n";
const IMAGE_WORD: &[u8] = b"omerta: firewall";
/// Boots of the guest image take seconds each.
const IMAGE_ROUNDS: u32 = 5;
/// Guests that start at once.
const AT_ONCE: usize = 50;
/// Guests that omertad looks after while its own use is measured.
const LOOKED_AFTER: usize = 100;
/// How long omertad is watched for what it takes of a core.
const IDLE: Duration = Duration::from_secs(15);
/// How long a guest may take to speak.
const DEADLINE: Duration = Duration::from_secs(120);

pub fn measure(rounds: Rounds) -> Result<Vec<Bench>> {
    let directory = tempfile::tempdir().context("cannot make a directory")?;
    let images = directory.path().join("images");
    write_bare_guest(&images.join("tiny"), SPEAKS).context("cannot write the small guest")?;
    let mut missing = Vec::new();
    match link_image(&images) {
        Ok(()) => {}
        Err(error) => missing.push(format!("image-bare, image-run: {error:#}")),
    }
    let provider = Provider::start(directory.path(), &images)?;
    let mut benches = Vec::new();

    let tiny = starts(
        &provider,
        &rounds,
        "tiny",
        64,
        TINY_WORD,
        ["tiny-bare", "tiny-run"],
    )?;
    benches.push(Bench::of("launch", "ms", &rounds, &tiny, Vec::new()));
    let few = rounds.at_most("launch-image", IMAGE_ROUNDS);
    let image = match missing.is_empty() {
        true => starts(
            &provider,
            &few,
            "image",
            256,
            IMAGE_WORD,
            ["image-bare", "image-run"],
        )?,
        false => Vec::new(),
    };
    benches.push(Bench::of("launch-image", "ms", &few, &image, missing));

    let once = Rounds::new("launch", 1, &[]);
    let one = |name, figure| Samples {
        name,
        against: name,
        figures: vec![figure],
    };
    let empty = provider.resident_mib()?;
    let (seconds, looks) = provider.many_at_once(AT_ONCE, "tiny")?;
    println!(
        "bench: launch: {looks} looks at taps while {AT_ONCE} guests started, none that was up without a guard"
    );
    benches.push(Bench::of(
        "launch-many",
        "s",
        &once,
        &[one("fifty", seconds)],
        Vec::new(),
    ));
    provider.many_at_once(LOOKED_AFTER - AT_ONCE, "tiny")?;
    let busy = provider.processor_share(IDLE)?;
    let memory = [
        one("omertad-alone", empty),
        one("omertad-100", provider.resident_mib()?),
        one("qemu-beside-guest", provider.qemu_beside_guest_mib(64)?),
    ];
    benches.push(Bench::of(
        "launch-memory",
        "MiB",
        &once,
        &memory,
        Vec::new(),
    ));
    let idle = [one("omertad-100-idle", busy)];
    benches.push(Bench::of(
        "launch-idle",
        "% of a core",
        &once,
        &idle,
        Vec::new(),
    ));
    provider.end()?;
    Ok(benches)
}

/// The guest image beside the small one, if it is built.
fn link_image(images: &Path) -> Result<()> {
    let built = PathBuf::from("target/image");
    let built = built
        .canonicalize()
        .context("no target/image: run `make image`")?;
    std::os::unix::fs::symlink(&built, images.join("image")).context("cannot link the image")
}

/// Milliseconds from the command to the guest's first word, by QEMU alone and by `omerta vm run`.
fn starts(
    provider: &Provider,
    rounds: &Rounds,
    image: &str,
    memory_mib: u32,
    word: &[u8],
    names: [&'static str; 2],
) -> Result<Vec<Samples>> {
    let bare = Bare::like(provider, image, memory_mib)?;
    let [alone, run] = names;
    rounds.run(vec![
        Case::new(alone, alone, || {
            let started = Instant::now();
            let running = bare.start()?;
            heard(running.log(), word, started)
        }),
        Case::new(run, alone, || {
            let started = Instant::now();
            let guest = provider.run(image, memory_mib)?;
            heard(guest.log(), word, started)
        }),
    ])
}

/// Waits until the console's log holds `word`; gives the milliseconds since `started`.
fn heard(log: &Path, word: &[u8], started: Instant) -> Result<f64> {
    let mut length = 0;
    loop {
        let now = std::fs::metadata(log).map_or(0, |found| found.len());
        if now != length {
            length = now;
            let text = std::fs::read(log).unwrap_or_default();
            if text.windows(word.len()).any(|part| part == word) {
                return Ok(started.elapsed().as_secs_f64() * 1000.0);
            }
        }
        if started.elapsed() > DEADLINE {
            bail!(
                "the guest has not spoken in {} s: {}",
                DEADLINE.as_secs(),
                log.display()
            );
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}
