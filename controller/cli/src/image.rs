//! `omerta image`: the store of images on this host.

mod progress;
mod sign;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use omerta_images::{
    Digest, ImageName, ImportError, Imported, Manifest, ManifestError, Opened, Recipe, RecipeError,
    RevokeError, Revoked, Seed, Sources, Store, StoreError, Trust, TrustError, TrustedKeys,
};
use serde::Serialize;
use serde_json::json;

use crate::args::Format;
use crate::args::image::{BuildArgs, ImageCommand, ImportArgs, Place, Signing};
use crate::exit::Exit;
use crate::exit::explain;
use crate::output::{Cell, Output, Side, Style, Table, bytes};
use progress::Progress;
use sign::{SecretKey, SignError};

/// Carries out one command.
///
/// # Errors
/// See [`ImageError`].
pub fn run(command: ImageCommand, out: &mut Output) -> Result<(), ImageError> {
    match command {
        ImageCommand::Build(args) => build(&args, out),
        ImageCommand::Import(args) => import(&args, out),
        ImageCommand::List { place, shown } => list(&place, shown.format, out),
        ImageCommand::Verify {
            names,
            place,
            shown,
        } => verify(names, &place, shown.format, out),
        ImageCommand::Remove { name, place, shown } => {
            Store::at(place.store).remove(&name)?;
            say(
                out,
                shown.format,
                &json!({"removed": name}),
                &format!("removed {name}; `omerta image gc` frees what it took"),
            )
        }
        ImageCommand::Revoke {
            what,
            why,
            place,
            shown,
        } => {
            // A digest is a name, too: one that no image should have.
            let digest = match what.as_str().parse::<Digest>() {
                Ok(digest) => digest,
                Err(_) => Store::at(place.store).digest(&what)?,
            };
            let is_new = Revoked::add(&place.trusted_keys, digest, &why)?;
            let told = match is_new {
                true => format!("revoked {what} ({digest}); guests that run it go on"),
                false => format!("{what} ({digest}) was revoked already"),
            };
            let value = json!({"revoked": digest, "new": is_new});
            say(out, shown.format, &value, &told)
        }
        ImageCommand::Gc { place, shown } => {
            let gone = Store::at(place.store).collect()?;
            let told = format!(
                "removed {} blobs ({}) and {} unfinished imports",
                gone.blobs,
                bytes(gone.bytes),
                gone.imports
            );
            let value = json!({"blobs": gone.blobs, "bytes": gone.bytes, "imports": gone.imports});
            say(out, shown.format, &value, &told)
        }
        ImageCommand::Keygen { key, shown } => {
            let public = sign::generate(&key)?;
            let told = format!(
                "made {} and {}; trust it by `install -D -m 644 {} {}/`",
                key.display(),
                public.display(),
                public.display(),
                crate::args::image::DEFAULT_TRUSTED_KEYS,
            );
            say(
                out,
                shown.format,
                &json!({"secret": key, "public": public}),
                &told,
            )
        }
    }
}

fn say(
    out: &mut Output,
    format: Format,
    value: &serde_json::Value,
    told: &str,
) -> Result<(), ImageError> {
    match format {
        Format::Json => out.json(value)?,
        Format::Text => out.line(told)?,
    }
    Ok(())
}

/// The keys that are trusted, and whether a signature of one is needed.
fn trust(place: &Place, require_signature: bool) -> Result<Trust, ImageError> {
    Ok(Trust {
        keys: TrustedKeys::read(&place.trusted_keys)?,
        require_signature,
    })
}

fn build(args: &BuildArgs, out: &mut Output) -> Result<(), ImageError> {
    let word = args.kind.word();
    let place = match &args.out {
        Some(place) => place.clone(),
        None => Path::new("/var/cache/omerta").join(word),
    };
    // What would be found only after minutes of building is found now.
    let key = args.signing.sign_with.as_deref().map(SecretKey::read);
    let key = key.transpose()?;
    let recipe = Recipe::unpack()?;
    let script = recipe.path(args.kind.script());
    let mut command = Command::new("sh");
    command.arg(&script);
    // The environment's own choice comes first; without either the recipe says what is missing.
    if std::env::var_os(AGENT).is_none()
        && let Some(agent) = installed_agent()
    {
        command.env(AGENT, agent);
    }
    if args.refresh {
        command.arg("--refresh");
    }
    // Standard output is for the result.
    let status = command
        .arg(&place)
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .map_err(ImageError::Recipe)?;
    if !status.success() {
        return Err(ImageError::Build { word, status });
    }
    if key.is_none() && !args.signing.unsigned {
        let told = format!(
            "built {word} in {}; `omerta image build {word} --out {} --sign-with KEY` puts it into the store",
            place.display(),
            place.display()
        );
        return say(out, args.shown.format, &json!({"built": place}), &told);
    }
    import_made(
        &Sources::within(&place),
        &name_of(args, word)?,
        args.kind.seed(),
        key.as_ref(),
        &args.place,
        args.shown.format,
        out,
    )
}

/// The variable that names the recipes the agent to put into an image.
const AGENT: &str = "OMERTA_AGENT";

/// The agent that was installed, or built, with this program.
fn installed_agent() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let directory = program.parent()?;
    [
        "../lib/omerta/omerta-agent",
        "../agent/x86_64-unknown-linux-gnu/release/omerta-agent",
    ]
    .into_iter()
    .map(|place| directory.join(place))
    .find(|place| place.is_file())
}

fn name_of(args: &BuildArgs, word: &str) -> Result<ImageName, ImageError> {
    match &args.name {
        Some(name) => Ok(name.clone()),
        None => word.parse().map_err(|_| ImageError::NoName),
    }
}

fn import(args: &ImportArgs, out: &mut Output) -> Result<(), ImageError> {
    let sources = args.sources().ok_or(ImageError::NoName)?;
    let Signing {
        sign_with,
        unsigned,
    } = &args.signing;
    let manifest = args.directory.as_ref().map(|d| d.join("manifest.json"));
    if let Some(manifest) = manifest.filter(|path| path.exists()) {
        if args.name.is_some() || sign_with.is_some() {
            return Err(ImageError::HasManifest(manifest));
        }
        let signature = manifest.with_extension("json.minisig");
        let signature = signature.exists().then(|| text(&signature)).transpose()?;
        let bytes = text(&manifest)?.into_bytes();
        let mut sources = sources;
        // The manifest says which disk, not what happens to lie there.
        if let Some(disk) = Manifest::parse(&bytes)?.disk {
            let directory = manifest.parent().unwrap_or(Path::new("."));
            sources.disk = Some(omerta_images::Source {
                path: directory.join(format!("disk.{}", disk.format.word())),
                format: disk.format,
                root: disk.root,
            });
        }
        let trust = trust(&args.place, !unsigned)?;
        let mut progress = Progress::new("importing", sources.bytes());
        let imported = Store::at(&args.place.store).import(
            &bytes,
            signature.as_deref(),
            &sources,
            &trust,
            &mut |length| progress.saw(length),
        )?;
        drop(progress);
        return tell_imported(&imported, args.shown.format, out);
    }
    let name = args.name.as_ref().ok_or(ImageError::NoName)?;
    if sign_with.is_none() && !unsigned {
        return Err(ImageError::Trust(TrustError::Unsigned(name.to_string())));
    }
    let key = sign_with.as_deref().map(SecretKey::read).transpose()?;
    import_made(
        &sources,
        name,
        args.seed.into(),
        key.as_ref(),
        &args.place,
        args.shown.format,
        out,
    )
}

/// Imports files that have no manifest yet; the operator's key, if given, answers for them.
fn import_made(
    sources: &Sources,
    name: &ImageName,
    seed: Seed,
    key: Option<&SecretKey>,
    place: &Place,
    format: Format,
    out: &mut Output,
) -> Result<(), ImageError> {
    let trust = trust(place, key.is_some())?;
    let mut progress = Progress::new("importing", 2 * sources.bytes());
    let manifest = sources.measure(name.clone(), seed, &mut |length| progress.saw(length))?;
    let manifest = manifest.to_bytes()?;
    let signature = key.map(|key| key.sign(&manifest)).transpose()?;
    let imported = Store::at(&place.store).import(
        &manifest,
        signature.as_deref(),
        sources,
        &trust,
        &mut |length| progress.saw(length),
    )?;
    drop(progress);
    tell_imported(&imported, format, out)
}

fn tell_imported(imported: &Imported, format: Format, out: &mut Output) -> Result<(), ImageError> {
    let signer = imported.signer.as_ref().map(|signer| &signer.0);
    let name = &imported.manifest.name;
    let value = json!({
        "name": name,
        "digest": imported.digest,
        "signer": signer,
        "was_there": imported.was_there,
    });
    let by = signer.map_or("unsigned".to_owned(), |signer| {
        format!("signed by {signer}")
    });
    let told = if imported.was_there {
        format!("{name} was there already, {by}")
    } else {
        format!("imported {name}, {by}")
    };
    say(out, format, &value, &told)
}

/// An image as `list` and `verify` show it.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    virtual_bytes: Option<u64>,
    signer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl Shown {
    fn of(name: String, found: &Result<Opened, StoreError>) -> Self {
        let image = found.as_ref().ok();
        let disk = image.and_then(|image| image.manifest.disk);
        Self {
            name,
            digest: image.map(|image| image.digest.to_string()),
            kind: image.map(|_| if disk.is_some() { "disk" } else { "initramfs" }),
            bytes: image.map(|image| image.manifest.parts().map(|(_, blob, _)| blob.bytes).sum()),
            virtual_bytes: disk.map(|disk| disk.virtual_bytes),
            signer: image.and_then(|image| Some(image.signer.as_ref()?.0.clone())),
            problem: found.as_ref().err().map(|error| explain(error)),
        }
    }
}

fn list(place: &Place, format: Format, out: &mut Output) -> Result<(), ImageError> {
    // What nobody trusted has signed is shown, and shown to be so.
    let trust = trust(place, false)?;
    let images = Store::at(&place.store).list(&trust)?;
    let shown = images
        .into_iter()
        .map(|image| Shown::of(image.name, &image.found));
    show(&shown.collect::<Vec<_>>(), format, out)
}

fn show(images: &[Shown], format: Format, out: &mut Output) -> Result<(), ImageError> {
    if format == Format::Json {
        return Ok(out.json(&images)?);
    }
    let mut table = Table::headed(&[
        (Side::Left, "NAME"),
        (Side::Left, "KIND"),
        (Side::Right, "SIZE"),
        (Side::Left, "SIGNER"),
        (Side::Left, "DIGEST"),
        (Side::Left, "PROBLEM"),
    ]);
    for image in images {
        let signer = match (&image.signer, &image.problem) {
            (Some(signer), _) => Cell::new(signer),
            (None, Some(_)) => Cell::new(""),
            (None, None) => Cell::styled(Style::Bad, "none trusted"),
        };
        table.row(vec![
            Cell::new(&image.name),
            Cell::new(image.kind.unwrap_or_default()),
            Cell::new(image.bytes.map(bytes).unwrap_or_default()),
            signer,
            Cell::new(
                image
                    .digest
                    .as_deref()
                    .map_or("", |digest| digest.get(..12).unwrap_or(digest)),
            ),
            Cell::styled(Style::Bad, image.problem.as_deref().unwrap_or_default()),
        ]);
    }
    Ok(out.table(&table)?)
}

/// Fails, once all have been looked at, with the first that is not as it should be.
fn verify(
    names: Vec<ImageName>,
    place: &Place,
    format: Format,
    out: &mut Output,
) -> Result<(), ImageError> {
    let (store, trust) = (Store::at(&place.store), trust(place, true)?);
    let names = if names.is_empty() {
        let listed = store.list(&trust)?;
        let names = listed.iter().filter_map(|image| image.name.parse().ok());
        names.collect()
    } else {
        names
    };
    let mut failure = None;
    let mut shown = Vec::new();
    for name in names {
        let found = store.open(&name, &trust).and_then(|image| {
            let total = image.manifest.parts().map(|(_, blob, _)| blob.bytes).sum();
            let mut progress = Progress::new("measuring", total);
            let verified = store.verify(&name, &trust, &mut |length| progress.saw(length))?;
            Ok(verified.image)
        });
        shown.push(Shown::of(name.to_string(), &found));
        failure = failure.or(found.err());
    }
    show(&shown, format, out)?;
    failure.map_or(Ok(()), |error| Err(error.into()))
}

fn text(path: &Path) -> Result<String, ImageError> {
    let failed = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > Manifest::MAX_BYTES {
        return Err(ImageError::Manifest(ManifestError::TooLong));
    }
    fs::read_to_string(path).map_err(failed)
}

/// Why a command about images failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The import.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The keys.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Revoking.
    #[error(transparent)]
    Revoke(#[from] RevokeError),
    /// Signing.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The recipes.
    #[error(transparent)]
    Unpack(#[from] RecipeError),
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No name was given.
    #[error("the image has no manifest and no name: give --name NAME")]
    NoName,
    /// A name or key was given for what has its own.
    #[error("{} names and signs the image: leave out --name and --sign-with, or remove it", .0.display())]
    HasManifest(PathBuf),
    /// No shell.
    #[error("cannot run the recipe with `sh`")]
    Recipe(#[source] io::Error),
    /// The recipe failed.
    #[error("the image {word} was not built ({status}): see above")]
    Build {
        /// Which.
        word: &'static str,
        /// How it ended.
        status: ExitStatus,
    },
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

impl ImageError {
    /// The exit code that fits.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Store(error) | Self::Import(ImportError::Store(error)) => match error {
                StoreError::NotFound { .. } => Exit::NotFound,
                StoreError::Exists(_) | StoreError::InUse(_) | StoreError::Trust(_) => {
                    Exit::Refused
                }
                _ => Exit::Failed,
            },
            Self::Import(ImportError::Missing(_)) => Exit::NotFound,
            Self::Import(ImportError::Altered { .. } | ImportError::Header { .. })
            | Self::Trust(_) => Exit::Refused,
            Self::Import(ImportError::Manifest(_))
            | Self::Manifest(_)
            | Self::NoName
            | Self::HasManifest(_) => Exit::Usage,
            Self::Sign(error) => error.exit(),
            Self::Revoke(RevokeError::Trust(_)) => Exit::Refused,
            Self::Revoke(RevokeError::Why) => Exit::Usage,
            _ => Exit::Failed,
        }
    }
}
