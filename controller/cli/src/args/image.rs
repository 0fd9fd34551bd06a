//! Arguments of `omerta image`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use omerta_images::{DiskFormat, ImageName, RootDevice, Seed, Source, Sources};

use super::Shown;

/// Where the store is unless told otherwise.
pub const DEFAULT_STORE: &str = "/var/lib/omerta/images";
/// Where the trusted keys are unless told otherwise.
pub const DEFAULT_TRUSTED_KEYS: &str = "/etc/omerta/trusted-keys";

/// The verbs of `omerta image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Build one of the project's images from the distribution's packages, and import it if it is signed
    Build(BuildArgs),

    /// Import an image: all of it, or nothing
    Import(ImportArgs),

    /// List images
    List {
        #[command(flatten)]
        place: Place,

        #[command(flatten)]
        shown: Shown,
    },

    /// Measure every byte of images against their manifests, and check their signatures
    Verify {
        /// The images; all if none is named
        names: Vec<ImageName>,

        #[command(flatten)]
        place: Place,

        #[command(flatten)]
        shown: Shown,
    },

    /// Remove an image that no guest runs; `gc` frees what it took
    Remove {
        /// The image
        name: ImageName,

        #[command(flatten)]
        place: Place,

        #[command(flatten)]
        shown: Shown,
    },

    /// Have omertad run an image no more, whoever has signed it: by name, one of the store; by digest, also what
    /// images are made of. Guests that run it go on
    Revoke {
        /// The image's name, or the SHA-256 digest of its manifest or of a kernel, initramfs or disk
        #[arg(value_name = "NAME|DIGEST")]
        what: ImageName,

        /// Why, for whoever wants to run it
        #[arg(long, value_name = "TEXT", default_value = "")]
        why: String,

        #[command(flatten)]
        place: Place,

        #[command(flatten)]
        shown: Shown,
    },

    /// Remove what belongs to no image, and what imports that were killed have left
    Gc {
        #[command(flatten)]
        place: Place,

        #[command(flatten)]
        shown: Shown,
    },

    /// Make a key to sign images with: KEY, and KEY.pub to be trusted
    Keygen {
        /// The file for the secret key, which must not be there yet
        key: PathBuf,

        #[command(flatten)]
        shown: Shown,
    },
}

/// Where images are, and whose are trusted.
#[derive(Debug, Args)]
pub struct Place {
    /// The store, as `store` in `[images]` of omertad's configuration
    #[arg(long, value_name = "DIR", env = "OMERTA_IMAGE_STORE", default_value = DEFAULT_STORE)]
    pub store: PathBuf,

    /// The directory of trusted keys, as `trusted_keys` there
    #[arg(long, value_name = "DIR", env = "OMERTA_TRUSTED_KEYS", default_value = DEFAULT_TRUSTED_KEYS)]
    pub trusted_keys: PathBuf,
}

/// Who answers for an image that is imported.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct Signing {
    /// Sign it with this minisign secret key
    #[arg(long, value_name = "KEY")]
    pub sign_with: Option<PathBuf>,

    /// Import it unsigned: omertad runs it only with `require_signature = false`
    #[arg(long)]
    pub unsigned: bool,
}

/// What can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A kernel and an initramfs of 5 MiB: a shell and WireGuard
    Small,
    /// Debian with systemd and cloud-init, on a disk of 2 GiB; takes mmdebstrap and qemu-utils
    Debian,
}

impl Kind {
    /// The script that builds it.
    pub const fn script(self) -> &'static str {
        match self {
            Self::Small => "build.sh",
            Self::Debian => "debian.sh",
        }
    }

    /// How its guests are told what they are.
    pub const fn seed(self) -> Seed {
        match self {
            Self::Small => Seed::Facts,
            Self::Debian => Seed::Nocloud,
        }
    }

    /// Its name.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Debian => "debian",
        }
    }
}

/// Arguments of `image build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// Which image
    #[arg(value_enum)]
    pub kind: Kind,

    /// Where to build it: packages are kept there for the next time [default: /var/cache/omerta/KIND]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// The image's name in the store [default: KIND]
    #[arg(long)]
    pub name: Option<ImageName>,

    /// Look up the packages' newest versions also where the recipe has not changed
    #[arg(long)]
    pub refresh: bool,

    #[command(flatten)]
    pub signing: Signing,

    #[command(flatten)]
    pub place: Place,

    #[command(flatten)]
    pub shown: Shown,
}

/// Arguments of `image import`.
#[derive(Debug, Args)]
#[command(
    after_help = "DIR holds vmlinuz, initrd.img, disk.qcow2 or disk.raw if there is a disk, and, unless \
    the image is signed here, manifest.json and manifest.json.minisig."
)]
pub struct ImportArgs {
    /// The directory of the image
    #[arg(required_unless_present = "kernel", conflicts_with_all = ["kernel", "initrd", "disk"])]
    pub directory: Option<PathBuf>,

    /// The image's name, where it has no manifest yet
    #[arg(long)]
    pub name: Option<ImageName>,

    /// The kernel
    #[arg(long, value_name = "FILE", requires = "initrd")]
    pub kernel: Option<PathBuf>,

    /// The initramfs
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// The disk
    #[arg(
        long,
        value_name = "FILE",
        requires = "kernel",
        requires = "disk_format"
    )]
    pub disk: Option<PathBuf>,

    /// How the disk's file is to be read; never guessed
    #[arg(long, value_enum)]
    pub disk_format: Option<Format>,

    /// Where on the disk the root file system is: vda, or a partition as vda1
    #[arg(long, value_name = "DEVICE", default_value_t = RootDevice::DISK)]
    pub root: RootDevice,

    /// How the guest is told what it is
    #[arg(long, value_enum, default_value = "facts")]
    pub seed: SeedWord,

    /// Its guests run omerta-agent, which the host is to ask (said already by a DIRECTORY that holds omerta-agent)
    #[arg(long)]
    pub agent: bool,

    /// Its guests' own firewall says on the console what it blocks, `ROGUE-ATTEMPT: ` (said already by a DIRECTORY that
    /// holds firewall-log)
    #[arg(long)]
    pub firewall_log: bool,

    #[command(flatten)]
    pub signing: Signing,

    #[command(flatten)]
    pub place: Place,

    #[command(flatten)]
    pub shown: Shown,
}

/// Formats of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The disk itself
    Raw,
    /// QEMU's own, without a backing file
    Qcow2,
}

/// Kinds of seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SeedWord {
    /// By fw_cfg, as the small image reads it
    Facts,
    /// By a disk for cloud-init as well
    Nocloud,
}

impl From<SeedWord> for Seed {
    fn from(word: SeedWord) -> Self {
        match word {
            SeedWord::Facts => Self::Facts,
            SeedWord::Nocloud => Self::Nocloud,
        }
    }
}

impl ImportArgs {
    /// The files that are named, singly or by their directory.
    pub fn sources(&self) -> Option<Sources> {
        if let Some(directory) = &self.directory {
            let mut sources = Sources::within(directory);
            if let Some(disk) = &mut sources.disk {
                disk.root = self.root;
            }
            sources.agent |= self.agent;
            sources.firewall_log |= self.firewall_log;
            return Some(sources);
        }
        let format = match self.disk_format {
            Some(Format::Raw) => DiskFormat::Raw,
            Some(Format::Qcow2) | None => DiskFormat::Qcow2,
        };
        Some(Sources {
            kernel: self.kernel.clone()?,
            initrd: self.initrd.clone()?,
            disk: self.disk.clone().map(|path| Source {
                path,
                format,
                root: self.root,
            }),
            agent: self.agent,
            firewall_log: self.firewall_log,
        })
    }
}
