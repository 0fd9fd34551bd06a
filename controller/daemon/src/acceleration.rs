//! How guests execute: as configured, or as found out by guests that ran.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex as StdMutex, PoisonError};
use std::time::Duration;

use omerta_vm_launcher::{Accel, AccelReport, Image, KernelProbe, probe_accel, probe_kernel};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// How long finding out may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// What is known of it. A kernel that KVM does not run speaks against KVM, not against the image:
/// from then on guests are emulated.
#[derive(Debug)]
pub(crate) struct Acceleration {
    configured: Option<Accel>,
    known: StdMutex<Option<AccelReport>>,
    /// The kernels that KVM has been seen to run. Held while one is tried.
    tried: Mutex<HashSet<Kernel>>,
}

/// A file as it was when it was tried.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Kernel {
    device: u64,
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

impl Kernel {
    fn at(path: &Path) -> std::io::Result<Self> {
        std::fs::metadata(path).map(|found| Self {
            device: found.dev(),
            inode: found.ino(),
            length: found.len(),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

impl Acceleration {
    /// As configured, or still to be found out.
    pub(crate) fn new(configured: Option<Accel>) -> Self {
        Self {
            configured,
            known: StdMutex::new(None),
            tried: Mutex::new(HashSet::new()),
        }
    }

    /// How guests execute, if that is known yet.
    pub(crate) fn known(&self) -> Option<AccelReport> {
        self.lock().clone()
    }

    /// Finds out before there is a guest, with the kernel of one of the images in `image_dir`, if there
    /// is any. May take seconds.
    pub(crate) async fn find(&self, image_dir: &Path) -> AccelReport {
        let image_dir = image_dir.to_owned();
        let looking = spawn_blocking(move || first_image(&image_dir));
        match timeout(DEADLINE, looking).await {
            Ok(Ok(Some(image))) => self.of(&image).await,
            _ => {
                let _turn = self.tried.lock().await;
                self.found().await
            }
        }
    }

    /// How guests of `image` execute. May take seconds for a kernel that has not been seen before.
    pub(crate) async fn of(&self, image: &Image) -> AccelReport {
        let mut tried = self.tried.lock().await;
        let report = self.found().await;
        if self.configured.is_some() || report.accel != Accel::Kvm {
            return report;
        }
        let path = image.kernel.clone();
        let looking = spawn_blocking(move || Kernel::at(&path).ok());
        let Ok(Ok(Some(kernel))) = timeout(DEADLINE, looking).await else {
            // The launch finds the same, and says so.
            return report;
        };
        if tried.contains(&kernel) {
            return report;
        }
        let (probed, handle) = (image.clone(), Handle::current());
        let trying = spawn_blocking(move || handle.block_on(probe_kernel(&probed)));
        match timeout(DEADLINE, trying).await {
            Ok(Ok(Ok(KernelProbe::Runs))) => {
                tried.insert(kernel);
                report
            }
            Ok(Ok(Ok(KernelProbe::Fails(found)))) => self.settle(found),
            Ok(Ok(Ok(KernelProbe::Unknown(why)))) => {
                let kernel = image.kernel.display();
                tracing::info!(%kernel, why, "whether KVM runs it cannot be found out before");
                report
            }
            // The launch finds the same, and says so.
            _ => report,
        }
    }

    async fn found(&self) -> AccelReport {
        if let Some(report) = self.known() {
            return report;
        }
        let report = match self.configured {
            Some(accel) => AccelReport {
                accel,
                why: "configured".to_owned(),
            },
            None => probed().await,
        };
        self.settle(report)
    }

    fn settle(&self, report: AccelReport) -> AccelReport {
        tracing::info!(accel = %report.accel, why = report.why, "acceleration chosen");
        self.lock().insert(report).clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<AccelReport>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first image by name that can be opened.
fn first_image(image_dir: &Path) -> Option<Image> {
    let mut directories: Vec<_> = std::fs::read_dir(image_dir)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    directories.sort();
    directories
        .iter()
        .find_map(|directory| Image::open(directory).ok())
}

/// How guests execute, found out on a thread that may be kept waiting.
async fn probed() -> AccelReport {
    let handle = Handle::current();
    let probing = spawn_blocking(move || handle.block_on(probe_accel()));
    match timeout(DEADLINE, probing).await {
        Ok(Ok(report)) => report,
        Ok(Err(_)) | Err(_) => AccelReport {
            accel: Accel::Tcg,
            why: format!(
                "whether KVM works could not be found out within {} s; emulating (TCG)",
                DEADLINE.as_secs()
            ),
        },
    }
}
