//! `omerta guard watch`: declared interfaces are guarded whenever they appear, and stay so.
//!
//! What the kernel notifies of, and a timer, are occasions to look; everything is then looked at as it
//! is, by a dump of all interfaces, so nothing depends on a notification that may be lost. An interface
//! that is up without a guard is set down before anything else is done about it.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use omerta_dataplane::links::{self, Changes, Interface};
use omerta_dataplane::{Guard, GuardConfig, GuardError, HeldGuard, Prepared};

use super::GuardCommandError;
use super::fence::Fence;
use crate::args::guard::{Attachment, InterfaceName};
use crate::args::watch;
use crate::exit::{explain, one_line};
use crate::output::Output;

/// Milliseconds after which everything is looked at where nothing was notified: of links that are cut and pins
/// that are lost nobody is.
const LOOK_AGAIN: u16 = 1000;
/// How long is waited where the interfaces changed while they were listed.
const LIST_AGAIN: Duration = Duration::from_millis(2);
/// After how many lists that were cut short in a row this is told, and `--once` gives up.
const CUT_SHORT: u32 = 100;

/// Guards the interfaces that `path` declares until the process is ended; or once.
pub fn run(path: &Path, once: bool, out: &mut Output) -> Result<(), GuardCommandError> {
    let declared = watch::read(path)?;
    let mut taps: Vec<_> = declared.taps.into_iter().map(Tap::new).collect();
    let mut fence = declared.fence.map(Fence::take).transpose()?;
    let changes = Changes::of_interfaces().map_err(GuardCommandError::Watch)?;
    let firewall = fence.as_ref().map(|_| Changes::of_firewall()).transpose();
    let firewall = firewall.map_err(GuardCommandError::Watch)?;
    let mut programs = None;
    let mut cut_short = 0_u32;
    loop {
        // Taken first: what changes while all is looked at is an occasion to look again.
        changes.take().map_err(GuardCommandError::Watch)?;
        if let (Some(fence), Some(firewall)) = (&mut fence, &firewall) {
            let occasion = firewall.take().map_err(GuardCommandError::Watch)?;
            if let Some(how) = fence.look(occasion) {
                out.line(format_args!("fence: {how}"))?;
            }
        }
        // Loaded before they are needed, since that takes a hundred times as long as attaching, and behind the
        // fence. Where they cannot be, the first guard tells why.
        programs.get_or_insert_with(|| Prepared::new(None));
        let group = fence.as_ref().map(Fence::group);
        match links::all() {
            Ok(interfaces) => {
                cut_short = 0;
                for tap in &mut taps {
                    tap.look(named(&interfaces, tap.name()), group, out)?;
                }
            }
            // They changed while they were listed, which was told as well.
            Err(error) if error.kind() == io::ErrorKind::Other => {
                cut_short = cut_short.wrapping_add(1);
                if cut_short.is_multiple_of(CUT_SHORT) {
                    if once {
                        return Err(GuardCommandError::Watch(error));
                    }
                    // Where stderr is closed guarding goes on all the same.
                    let _ = writeln!(
                        io::stderr(),
                        "omerta: the interfaces cannot be listed, {cut_short} times in a row: {error}"
                    );
                }
                thread::sleep(LIST_AGAIN);
                continue;
            }
            Err(error) => return Err(GuardCommandError::Watch(error)),
        }
        if once {
            return match taps.iter().filter(|tap| tap.told.is_some()).count() {
                0 if fence.as_ref().is_some_and(Fence::is_wrong) => Err(GuardCommandError::NoFence),
                0 => Ok(()),
                count => Err(GuardCommandError::Unguarded(count)),
            };
        }
        let told = [Some(&changes), firewall.as_ref()].into_iter().flatten();
        let mut told: Vec<_> = told
            .map(|changes| PollFd::new(changes.as_fd(), PollFlags::POLLIN))
            .collect();
        match poll(&mut told, PollTimeout::from(LOOK_AGAIN)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(GuardCommandError::Watch(errno.into())),
        }
    }
}

/// The interface of that name, or that has it besides its own (`ip link property add ... altname`).
fn named<'a>(interfaces: &'a [Interface], name: &str) -> Option<&'a Interface> {
    let own = interfaces.iter().find(|one| one.name == name);
    own.or_else(|| {
        let index = if_nametoindex(name).ok()?;
        interfaces.iter().find(|one| one.index == index)
    })
}

/// One declared interface.
struct Tap {
    declared: Attachment,
    /// The index of the interface that was looked at last; `None` before the first look.
    known: Option<u32>,
    /// The guard that is in force, held open: it judges whatever becomes of its pins.
    held: Option<HeldGuard>,
    /// Whether that guard notes which group the fence lets it through in.
    is_noted: bool,
    /// The index of the interface that was set down and is to be set up again.
    set_down: Option<u32>,
    /// What is wrong, as it was told last.
    told: Option<String>,
}

impl Tap {
    fn new(declared: Attachment) -> Self {
        Self {
            declared,
            known: None,
            held: None,
            is_noted: false,
            set_down: None,
            told: None,
        }
    }

    fn name(&self) -> &str {
        self.declared.interface.as_str()
    }

    fn config(&self) -> &GuardConfig {
        &self.declared.config
    }

    /// Looks at the interface as it is, and has it guarded. In `group` are those that the fence lets through.
    fn look(
        &mut self,
        found: Option<&Interface>,
        group: Option<u32>,
        out: &mut Output,
    ) -> io::Result<()> {
        let Some(found) = found else {
            // A guard follows an interface that is renamed. What is held is of nobody else's use.
            self.held = None;
            self.known = Some(0);
            self.set_down = None;
            self.told = None;
            return Ok(());
        };
        let looked = self.guard(found, group).and_then(|how| {
            self.let_through(found, group, self.held.is_some())?;
            Ok(how)
        });
        match looked {
            Ok(None) => {}
            Ok(Some(how)) => {
                self.told = None;
                out.line(format_args!(
                    "{} (index {}): {how}",
                    self.name(),
                    found.index
                ))?;
            }
            Err(error) => {
                let judges = self.judges(found.index).unwrap_or(false);
                // The error to tell is the first.
                let _ = self.let_through(found, group, judges);
                self.tell(&explain(&error));
            }
        }
        Ok(())
    }

    /// Has the fence let the interface through, or not any more.
    fn let_through(
        &mut self,
        found: &Interface,
        group: Option<u32>,
        through: bool,
    ) -> Result<(), GuardError> {
        let Some(group) = group else { return Ok(()) };
        match (through, found.group == group) {
            // Where the interface is in the group already, as one that had another guard, this one must note it:
            // whoever removes it takes the interface out by that.
            (true, is_in) if !(is_in && self.is_noted) => {
                Guard::open(self.name())?.enter_group(group)?;
                self.is_noted = true;
                Ok(())
            }
            (false, true) => match links::set_group(found.index, 0) {
                // It has gone, and the next look finds what came.
                Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(()),
                done => self.system("set the group of", done),
            },
            _ => Ok(()),
        }
    }

    /// What was done, if anything.
    fn guard(
        &mut self,
        found: &Interface,
        group: Option<u32>,
    ) -> Result<Option<&'static str>, GuardError> {
        let name = self.name().to_owned();
        let known = self.known.replace(found.index);
        if known.is_some_and(|known| known != found.index) {
            // Another interface: what was enforced on the last is not for this one.
            self.held = None;
            // Whoever else guards it has had no time to: nothing is asked before it is down.
            self.set_down(found)?;
        }
        match Guard::open(&name) {
            Ok(guard) if self.held.as_ref().is_some_and(|held| held.is(&guard)) => {
                if !self.judges(found.index)? {
                    // Upgraded since, or of filters, which cannot tell.
                    self.held = Some(guard.hold()?);
                }
                self.set_up_again(found.index)?;
                return self.is_first(&guard).map(|()| None);
            }
            Ok(guard) if guard.ifindex() == found.index => {
                self.hold(&guard)?;
                self.set_up_again(found.index)?;
                self.is_first(&guard)?;
                return Ok(Some("in force"));
            }
            // Of an interface that came since; the next look finds it.
            Ok(_) => return Ok(None),
            Err(error @ (GuardError::NoInterface { .. } | GuardError::Busy { .. })) => {
                return match error {
                    GuardError::NoInterface { .. } => Ok(None),
                    error => Err(error),
                };
            }
            Err(_) => {}
        }
        // What is held judges on without its pins, so nothing is open; the new guard stands before it.
        let judges = self.judges(found.index).unwrap_or(false);
        if !judges {
            self.set_down(found)?;
        }
        let mode = match &self.held {
            Some(held) => held.mode(),
            None => Ok(self.config().mode),
        };
        if mode.is_err() {
            // What is held is not known, and ends with this process.
            self.set_down(found)?;
        }
        mode?;
        let guard = match &self.held {
            // What was revoked since it was declared stays so, and a lease that has ended.
            Some(held) => {
                let group = group.filter(|group| *group == found.group);
                Guard::attach_in_place_of(held, &name, self.config(), group)?
            }
            None => Guard::attach(&name, self.config())?,
        };
        self.hold(&guard)?;
        if let Some(peers) = &self.declared.redirect {
            let peers: Vec<_> = peers.iter().map(InterfaceName::as_str).collect();
            // Where it cannot be, what is allowed goes by the stack.
            if let Err(error) = guard.redirect(&peers) {
                self.say(&format!(
                    "guarded, and nothing is redirected: {}",
                    explain(&error)
                ));
            }
        }
        let how = match (judges, self.set_down) {
            (true, _) => "its pins were lost: judged on, and guarded anew",
            (false, Some(_)) => "guarded; it was up without a guard, and set down meanwhile",
            (false, None) => "guarded",
        };
        self.set_up_again(guard.ifindex())?;
        self.is_first(&guard)?;
        Ok(Some(how))
    }

    fn hold(&mut self, guard: &Guard) -> Result<(), GuardError> {
        self.is_noted = false;
        self.held = Some(guard.hold()?);
        Ok(())
    }

    /// Whether the guard that is held judges on the interface of index `index`.
    fn judges(&self, index: u32) -> Result<bool, GuardError> {
        self.held
            .as_ref()
            .map_or(Ok(false), |held| held.is_on(index))
    }

    fn set_down(&mut self, found: &Interface) -> Result<(), GuardError> {
        if found.is_up {
            self.system("set down", links::set_up(found.index, false))?;
            self.set_down = Some(found.index);
        }
        Ok(())
    }

    fn set_up_again(&mut self, index: u32) -> Result<(), GuardError> {
        if self.set_down == Some(index) {
            self.system("set up", links::set_up(index, true))?;
        }
        self.set_down = None;
        Ok(())
    }

    /// Fails where another program stands before the guard's, and tells where that is over.
    fn is_first(&mut self, guard: &Guard) -> Result<(), GuardError> {
        match guard.verify() {
            Ok(()) => {
                if self.told.take().is_some() {
                    self.say("as it should be again");
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn system(&self, action: &'static str, done: io::Result<()>) -> Result<(), GuardError> {
        done.map_err(|source| GuardError::System {
            action,
            interface: self.name().to_owned(),
            source,
        })
    }

    /// Tells what is wrong, once.
    fn tell(&mut self, why: &str) {
        if self.told.as_deref() == Some(why) {
            return;
        }
        self.say(&match self.set_down {
            Some(_) => format!("not guarded, and left down: {why}"),
            None => why.to_owned(),
        });
        self.told = Some(why.to_owned());
    }

    fn say(&self, what: &str) {
        // Where stderr is closed guarding goes on all the same.
        let _ = writeln!(io::stderr(), "omerta: {}: {}", self.name(), one_line(what));
    }
}
