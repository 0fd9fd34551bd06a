//! How guests execute, and on which machine: as configured, or as found out by guests that ran.

use std::path::Path;
use std::sync::{Mutex as StdMutex, PoisonError};
use std::time::Duration;

use omerta_vm_launcher::{
    Accel, AccelReport, Image, KernelProbe, MachineType, MicrovmProbe, probe_accel, probe_kernel,
    probe_microvm,
};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::images::Images;
use crate::probed::{FileIdentity, Probed, Tried};

/// How long finding out may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// What a guest runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Platform {
    pub(crate) accel: Accel,
    pub(crate) machine: MachineType,
}

/// What is known of it. A kernel that KVM does not run speaks against KVM, not against the image:
/// from then on guests are emulated.
#[derive(Debug)]
pub(crate) struct Acceleration {
    configured: Option<Accel>,
    machine: Option<MachineType>,
    known: StdMutex<Known>,
    /// What was found out since this boot, also by an omertad before. Held while something is tried.
    probed: Mutex<Probed>,
}

/// What people are told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub(crate) accel: Option<AccelReport>,
    /// The last kernel's machine, and why.
    pub(crate) machine: String,
}

impl Acceleration {
    /// As configured, or still to be found out; what is found out is kept in `state_dir`.
    pub(crate) fn new(
        configured: Option<Accel>,
        machine: Option<MachineType>,
        state_dir: &Path,
    ) -> Self {
        let known = Known {
            accel: None,
            machine: match machine {
                Some(machine) => format!("{machine}: configured"),
                None => "no kernel has been tried yet".to_owned(),
            },
        };
        Self {
            configured,
            machine,
            known: StdMutex::new(known),
            probed: Mutex::new(Probed::of_this_boot(state_dir)),
        }
    }

    /// What is known yet.
    pub(crate) fn known(&self) -> Known {
        self.lock().clone()
    }

    /// Finds out before there is a guest, with the kernel of one of the images, if there is any. May take
    /// seconds.
    pub(crate) async fn find(&self, images: Images) {
        let looking = spawn_blocking(move || images.first());
        match timeout(DEADLINE, looking).await {
            Ok(Ok(Some(image))) => {
                self.of(&image).await;
            }
            _ => {
                let mut probed = self.probed.lock().await;
                self.accel(&mut probed).await;
            }
        }
    }

    /// What guests of `image` run on. May take seconds for a kernel that has not been seen before.
    pub(crate) async fn of(&self, image: &Image) -> Platform {
        let mut probed = self.probed.lock().await;
        let accel = self.accel(&mut probed).await;
        let path = image.kernel.clone();
        let looking = spawn_blocking(move || FileIdentity::of(&path).ok());
        let Ok(Ok(Some(kernel))) = timeout(DEADLINE, looking).await else {
            // The launch finds the same, and says so.
            let machine = self.machine.unwrap_or(MachineType::Q35);
            return Platform { accel, machine };
        };
        let tried = match probed.kernel(&kernel) {
            Some(tried) => tried.clone(),
            None => self.try_kernel(image, kernel, accel, &mut probed).await,
        };
        let machine = match self.machine {
            Some(configured) => configured,
            None => {
                self.lock().machine = format!("{}: {}", tried.machine(), tried.why);
                tried.machine()
            }
        };
        let accel = self.known().accel.map_or(accel, |report| report.accel);
        Platform { accel, machine }
    }

    /// How guests execute, by what is configured, known, or found out now.
    async fn accel(&self, probed: &mut Probed) -> Accel {
        if let Some(report) = self.known().accel {
            return report.accel;
        }
        let report = match (self.configured, probed.accel()) {
            (Some(accel), _) => AccelReport {
                accel,
                why: "configured".to_owned(),
            },
            (None, Some(report)) => report,
            (None, None) => {
                let report = tiny_guest().await;
                probed.keep_accel(&report);
                report
            }
        };
        self.settle(report).accel
    }

    /// Has KVM boot the kernel, where guests are to run on that, and then the small machine.
    async fn try_kernel(
        &self,
        image: &Image,
        kernel: FileIdentity,
        mut accel: Accel,
        probed: &mut Probed,
    ) -> Tried {
        let path = image.kernel.display().to_string();
        if self.configured.is_none() && accel == Accel::Kvm {
            let image = image.clone();
            let trying = run(move |handle| handle.block_on(probe_kernel(&image)));
            match trying.await {
                Some(Ok(KernelProbe::Runs)) => {}
                Some(Ok(KernelProbe::Fails(report))) => {
                    probed.keep_accel(&report);
                    accel = self.settle(report).accel;
                }
                Some(Ok(KernelProbe::Unknown(why))) => {
                    tracing::info!(
                        kernel = path,
                        why,
                        "whether KVM runs it cannot be found out before"
                    );
                    return Tried::q35(why);
                }
                // The launch finds the same, and says so.
                Some(Err(_)) | None => return Tried::q35("it could not be tried".to_owned()),
            }
        }
        if self.machine.is_some() {
            let tried = Tried::q35("not tried: the machine is configured".to_owned());
            probed.remember(kernel, tried.clone());
            return tried;
        }
        if accel == Accel::Tcg {
            let tried = Tried::q35(
                "microvm is for KVM: an emulated kernel may not find its clock there".to_owned(),
            );
            probed.remember(kernel, tried.clone());
            return tried;
        }
        let probing = image.clone();
        let trying = run(move |handle| handle.block_on(probe_microvm(&probing)));
        let tried = match trying.await {
            Some(Ok(MicrovmProbe::Runs)) => Tried::microvm(format!("{path} came up on it")),
            Some(Ok(MicrovmProbe::Fails(why))) => {
                Tried::q35(format!("{path} fails on microvm: {why}"))
            }
            Some(Err(_)) | None => return Tried::q35(format!("{path} could not be tried")),
        };
        tracing::info!(machine = %tried.machine(), why = tried.why, "machine chosen");
        probed.keep_kernel(kernel, tried.clone());
        tried
    }

    fn settle(&self, report: AccelReport) -> AccelReport {
        tracing::info!(accel = %report.accel, why = report.why, "acceleration chosen");
        self.lock().accel.insert(report).clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what may hang on a thread of its own; `None` where it took too long.
async fn run<T: Send + 'static>(work: impl FnOnce(Handle) -> T + Send + 'static) -> Option<T> {
    let handle = Handle::current();
    let running = spawn_blocking(move || work(handle));
    timeout(DEADLINE, running).await.ok()?.ok()
}

/// How guests execute, as a guest of a few instructions tells.
async fn tiny_guest() -> AccelReport {
    let probing = run(|handle| handle.block_on(probe_accel()));
    probing.await.unwrap_or_else(|| AccelReport {
        accel: Accel::Tcg,
        why: format!(
            "whether KVM works could not be found out within {} s; emulating (TCG)",
            DEADLINE.as_secs()
        ),
    })
}
