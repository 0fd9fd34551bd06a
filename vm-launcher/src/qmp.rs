//! The conversation with QEMU: every step has a deadline, every answer is checked.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join;
use qapi::futures::{QapiService, QmpStreamTokio};
use qapi::qmp::{self, Event, RunState, ShutdownCause};
use tokio::io::DuplexStream;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::qmp_lines;

/// How long QEMU may take to open its socket and greet.
pub(crate) const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long QEMU may take to answer a command.
pub(crate) const COMMAND_DEADLINE: Duration = Duration::from_secs(5);

/// Why QMP did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU did not open its socket, or did not greet, in time.
    #[error("QEMU did not answer on its QMP socket within {} s; the host may be overloaded: see `uptime`, then run the guest again", .0.as_secs_f32())]
    NoGreeting(Duration),
    /// The socket broke, or what came from it is not QMP.
    #[error(
        "QEMU hung up or spoke nonsense at `{step}`; see `dmesg` for whether it was killed, then run the guest again"
    )]
    Broken {
        /// What was being done.
        step: &'static str,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// QEMU did not answer a command in time.
    #[error("QEMU did not answer `{command}` within {} s", deadline.as_secs_f32())]
    NoAnswer {
        /// The command.
        command: &'static str,
        /// The deadline.
        deadline: Duration,
    },
    /// QEMU refused a command.
    #[error("QEMU refused `{command}`: {said}")]
    Refused {
        /// The command.
        command: &'static str,
        /// What QEMU said.
        said: String,
    },
    /// QEMU is in another state than it must be.
    #[error("QEMU says that the guest is `{found}` where it must be `{expected}`")]
    WrongState {
        /// The state it must be in.
        expected: &'static str,
        /// The state it says it is in.
        found: String,
    },
}

/// What QEMU reports unasked, as far as it is acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MachineEvent {
    Stopped,
    Resumed,
    /// The guest has turned its power off.
    Shutdown,
    Reset,
    Panicked,
}

/// How a guest is found whose launcher is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It runs.
    Running,
    /// It stands still, and may run on.
    Still,
    /// Its kernel has panicked; it stands still.
    Panicked,
}

/// An open, negotiated QMP connection.
pub(crate) struct Qmp {
    service: QapiService<QmpStreamTokio<OwnedWriteHalf>>,
    tasks: [JoinHandle<()>; 2],
}

impl fmt::Debug for Qmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Qmp")
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Qmp {
    /// Connects to `socket`, which QEMU may still have to open, and negotiates.
    pub(crate) async fn connect(
        socket: &Path,
        deadline: Duration,
    ) -> Result<(Self, mpsc::Receiver<MachineEvent>), QmpError> {
        timeout(deadline, async {
            let stream = connect_when_open(socket).await?;
            Self::negotiate(stream).await
        })
        .await
        .unwrap_or(Err(QmpError::NoGreeting(deadline)))
    }

    async fn negotiate(
        stream: UnixStream,
    ) -> Result<(Self, mpsc::Receiver<MachineEvent>), QmpError> {
        let broken = |step| move |source| QmpError::Broken { step, source };
        let (from_qemu, to_qemu) = stream.into_split();
        // Both ways are held in full for as long as the guest lives.
        let (lines_out, lines_in) = tokio::io::duplex(1 << 10);
        let lines = AbortOnDrop(Some(tokio::spawn(copy_lines(from_qemu, lines_out))));
        let greeted = QmpStreamTokio::open_split(lines_in, to_qemu)
            .await
            .map_err(broken("greeting"))?;
        let negotiated = greeted
            .negotiate()
            .await
            .map_err(broken("qmp_capabilities"))?;
        let (service, events) = negotiated.into_parts();
        let (sender, receiver) = mpsc::channel(64);
        let driver = tokio::spawn(forward_events(events, sender));
        match lines.keep() {
            Some(lines) => Ok((
                Self {
                    service,
                    tasks: [lines, driver],
                },
                receiver,
            )),
            None => Err(broken("greeting")(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Stops the guest, and checks that only `cont` can make it run again.
    ///
    /// QEMU before 9.0 acknowledges `stop` of a guest that sleeps (ACPI S3) and leaves it asleep:
    /// its own alarm then wakes it.
    pub(crate) async fn stop(&self) -> Result<(), QmpError> {
        // Both at once: QEMU answers in turn, and a busy host is not waited for twice.
        let (stopped, found) = join(self.execute("stop", qmp::stop {}), self.state()).await;
        stopped?;
        // Where another command came between the two, it may have been asked before.
        let found = match found? {
            found if stays(&found) => found,
            _ => self.state().await?,
        };
        if stays(&found) {
            return Ok(());
        }
        Err(QmpError::WrongState {
            expected: "paused",
            found: format!("{found:?}"),
        })
    }

    /// Why the guest can never go on, if so: what the accelerator or a device met is told by no event
    /// of its own but only by the state.
    pub(crate) async fn fault(&self) -> Result<Option<&'static str>, QmpError> {
        Ok(match self.state().await? {
            RunState::internal_error => Some("internal-error"),
            RunState::io_error => Some("io-error"),
            _ => None,
        })
    }

    /// Whether the guest runs, or how it stands still.
    pub(crate) async fn found(&self) -> Result<Found, QmpError> {
        Ok(match self.state().await? {
            RunState::running => Found::Running,
            RunState::guest_panicked => Found::Panicked,
            RunState::paused | RunState::prelaunch => Found::Still,
            other => {
                return Err(QmpError::WrongState {
                    expected: "running",
                    found: format!("{other:?}"),
                });
            }
        })
    }

    /// Lets the guest run, and checks that it does.
    pub(crate) async fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", qmp::cont {}).await?;
        self.require_state("running", RunState::running).await
    }

    /// Checks that the guest has not run yet.
    pub(crate) async fn require_prelaunch(&self) -> Result<(), QmpError> {
        self.require_state("prelaunch", RunState::prelaunch).await
    }

    /// Presses the guest's power button.
    pub(crate) async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.execute("system_powerdown", qmp::system_powerdown {})
            .await?;
        Ok(())
    }

    /// Presses the guest's reset button.
    pub(crate) async fn system_reset(&self) -> Result<(), QmpError> {
        self.execute("system_reset", qmp::system_reset {}).await?;
        Ok(())
    }

    /// Tells QEMU to end.
    pub(crate) async fn quit(&self) -> Result<(), QmpError> {
        self.execute("quit", qmp::quit {}).await?;
        Ok(())
    }

    async fn require_state(&self, expected: &'static str, state: RunState) -> Result<(), QmpError> {
        let found = self.state().await?;
        if found == state {
            Ok(())
        } else {
            let found = format!("{found:?}");
            Err(QmpError::WrongState { expected, found })
        }
    }

    async fn state(&self) -> Result<RunState, QmpError> {
        let status = self.execute("query-status", qmp::query_status {}).await?;
        Ok(status.status)
    }

    async fn execute<C: qmp::QmpCommand>(
        &self,
        name: &'static str,
        command: C,
    ) -> Result<C::Ok, QmpError> {
        let answer = timeout(COMMAND_DEADLINE, self.service.execute(command)).await;
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(qapi::ExecuteError::Qapi(error))) => {
                let said = error
                    .desc
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(200)
                    .collect();
                Err(QmpError::Refused {
                    command: name,
                    said,
                })
            }
            Ok(Err(qapi::ExecuteError::Io(source))) => Err(QmpError::Broken { step: name, source }),
            Err(_) => Err(QmpError::NoAnswer {
                command: name,
                deadline: COMMAND_DEADLINE,
            }),
        }
    }
}

/// Whether only `cont` makes a guest run that is in this state. A reset leaves a stopped one in `prelaunch`.
const fn stays(state: &RunState) -> bool {
    use RunState::{guest_panicked, internal_error, paused, prelaunch, shutdown};
    matches!(
        state,
        paused | prelaunch | shutdown | guest_panicked | internal_error
    )
}

async fn connect_when_open(socket: &Path) -> Result<UnixStream, QmpError> {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                sleep(Duration::from_millis(5)).await;
            }
            Err(source) => {
                return Err(QmpError::Broken {
                    step: "connect",
                    source,
                });
            }
        }
    }
}

async fn copy_lines(from: tokio::net::unix::OwnedReadHalf, to: DuplexStream) {
    if let Err(error) = qmp_lines::copy(from, to).await {
        tracing::warn!(%error, "QMP connection ended");
    }
}

/// Drives the connection: answers go to their commands, events to `sender`.
async fn forward_events(
    mut events: qapi::futures::QapiEvents<QmpStreamTokio<DuplexStream>>,
    sender: mpsc::Sender<MachineEvent>,
) {
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(Event::STOP { .. }) => MachineEvent::Stopped,
            Ok(Event::RESUME { .. }) => MachineEvent::Resumed,
            // QEMU also tells of its own signals and of `quit`, which say nothing of the guest.
            Ok(Event::SHUTDOWN { data, .. }) if data.reason == ShutdownCause::guest_shutdown => {
                MachineEvent::Shutdown
            }
            Ok(Event::RESET { .. }) => MachineEvent::Reset,
            Ok(Event::GUEST_PANICKED { .. }) => MachineEvent::Panicked,
            Ok(_) => continue,
            // An answer to a command whose deadline has passed, or to none at all.
            Err(error) => {
                tracing::warn!(%error, "unexpected message on QMP");
                continue;
            }
        };
        // Waiting here would hold up the answers behind the event. The reader is a task of ours
        // that never waits for anyone; only a guest that resets in a loop can fill this.
        if sender.try_send(event).is_err() {
            tracing::warn!(?event, "event dropped");
        }
    }
}

struct AbortOnDrop(Option<JoinHandle<()>>);

impl AbortOnDrop {
    fn keep(mut self) -> Option<JoinHandle<()>> {
        self.0.take()
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;

    /// A QEMU that greets with `greeting` and then answers each command by `answer`, which is
    /// given the command's name and its id.
    async fn connected_to(
        greeting: &'static str,
        answer: impl Fn(&str, u64) -> Option<String> + Send + 'static,
    ) -> Result<(Qmp, mpsc::Receiver<MachineEvent>), QmpError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (from, mut to) = stream.into_split();
            to.write_all(format!("{greeting}\n").as_bytes())
                .await
                .unwrap();
            let mut lines = BufReader::new(from).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let command: serde_json::Value = serde_json::from_str(&line).unwrap();
                let name = command["execute"].as_str().unwrap();
                if let Some(answer) = answer(name, command["id"].as_u64().unwrap()) {
                    to.write_all(format!("{answer}\n").as_bytes())
                        .await
                        .unwrap();
                }
            }
        });
        Qmp::connect(&path, Duration::from_millis(300)).await
    }

    fn done(id: u64) -> String {
        format!(r#"{{"return": {{}}, "id": {id}}}"#)
    }

    fn state(state: &str, id: u64) -> String {
        format!(
            r#"{{"return": {{"running": false, "singlestep": false, "status": "{state}"}}, "id": {id}}}"#
        )
    }

    #[tokio::test]
    async fn no_socket_is_given_up_at_the_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let started = Instant::now();
        let deadline = Duration::from_millis(200);
        let error = Qmp::connect(&directory.path().join("qmp.sock"), deadline)
            .await
            .unwrap_err();
        assert!(matches!(error, QmpError::NoGreeting(_)), "{error}");
        assert!(started.elapsed() < Duration::from_secs(2));
    }

    #[tokio::test]
    async fn silence_is_given_up_at_the_deadline() {
        let error = connected_to("", |_, _| None).await.unwrap_err();
        assert!(
            matches!(error, QmpError::Broken { .. } | QmpError::NoGreeting(_)),
            "{error}"
        );
        let error = connected_to(GREETING, |_, _| None).await.unwrap_err();
        assert!(matches!(error, QmpError::NoGreeting(_)), "{error}");
    }

    #[tokio::test]
    async fn what_is_not_qmp_is_refused() {
        for greeting in [
            "SSH-2.0-OpenSSH",
            "{}",
            r#"{"return": {}}"#,
            r#"{"QMP": 1}"#,
        ] {
            let error = connected_to(greeting, |_, id| Some(done(id)))
                .await
                .unwrap_err();
            assert!(
                matches!(
                    error,
                    QmpError::Broken {
                        step: "greeting",
                        ..
                    }
                ),
                "{error:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_guest_that_kvm_gave_up_on_is_told_from_one_that_was_stopped() {
        for (word, fault) in [
            ("internal-error", true),
            ("io-error", true),
            ("paused", false),
        ] {
            let answer = move |name: &str, id| {
                Some(if name == "query-status" {
                    state(word, id)
                } else {
                    done(id)
                })
            };
            let (qmp, _events) = connected_to(GREETING, answer).await.unwrap();
            assert_eq!(qmp.fault().await.unwrap(), fault.then_some(word));
        }
    }

    #[tokio::test]
    async fn a_guest_that_already_runs_is_no_prelaunch_guest() {
        let answer = |name: &str, id| {
            Some(if name == "query-status" {
                state("running", id)
            } else {
                done(id)
            })
        };
        let (qmp, _events) = connected_to(GREETING, answer).await.unwrap();
        let error = qmp.require_prelaunch().await.unwrap_err();
        assert!(
            matches!(
                error,
                QmpError::WrongState {
                    expected: "prelaunch",
                    ..
                }
            ),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn cont_that_is_acknowledged_and_not_done_is_an_error() {
        let answer = |name: &str, id| {
            Some(if name == "query-status" {
                state("prelaunch", id)
            } else {
                done(id)
            })
        };
        let (qmp, _events) = connected_to(GREETING, answer).await.unwrap();
        let error = qmp.cont().await.unwrap_err();
        assert!(
            matches!(
                error,
                QmpError::WrongState {
                    expected: "running",
                    ..
                }
            ),
            "{error:?}"
        );
    }

    /// The answers of a QEMU that acknowledges everything and is in the state `found`.
    fn found_in(found: &'static str) -> impl Fn(&str, u64) -> Option<String> {
        move |name, id| {
            Some(if name == "query-status" {
                state(found, id)
            } else {
                done(id)
            })
        }
    }

    /// QEMU before 9.0 acknowledges `stop` of a guest in S3, leaves it `suspended`, and lets its own
    /// alarm wake it: it runs again.
    #[tokio::test]
    async fn stop_that_leaves_the_guest_able_to_wake_is_an_error() {
        for found in ["suspended", "running"] {
            let (qmp, _events) = connected_to(GREETING, found_in(found)).await.unwrap();
            let error = qmp.stop().await.unwrap_err();
            assert!(matches!(error, QmpError::WrongState { .. }), "{error:?}");
        }
    }

    #[tokio::test]
    async fn stop_of_a_guest_that_stands_still_is_done() {
        for found in ["paused", "prelaunch", "shutdown", "guest-panicked"] {
            let (qmp, _events) = connected_to(GREETING, found_in(found)).await.unwrap();
            qmp.stop().await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_refusal_is_quoted_in_one_printable_line() {
        let answer = |name: &str, id| {
            Some(if name == "stop" {
                format!(
                    r#"{{"error": {{"class": "GenericError", "desc": "no\nway"}}, "id": {id}}}"#
                )
            } else {
                done(id)
            })
        };
        let (qmp, _events) = connected_to(GREETING, answer).await.unwrap();
        let error = qmp.stop().await.unwrap_err().to_string();
        assert_eq!(error, "QEMU refused `stop`: noway");
    }

    #[tokio::test]
    async fn an_unanswered_command_ends_at_its_deadline_and_later_ones_still_work() {
        let answer = |name: &str, id| (name != "stop").then(|| done(id));
        let (qmp, _events) = connected_to(GREETING, answer).await.unwrap();
        let started = Instant::now();
        let error = qmp.stop().await.unwrap_err();
        assert!(
            matches!(
                error,
                QmpError::NoAnswer {
                    command: "stop",
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(started.elapsed() < COMMAND_DEADLINE + Duration::from_secs(2));
        qmp.quit().await.unwrap();
    }

    #[tokio::test]
    async fn events_arrive_and_strange_messages_do_not_blind() {
        let answer = |name: &str, id| {
            let time = r#""timestamp": {"seconds": 1, "microseconds": 2}"#;
            Some(if name == "query-status" {
                state("paused", id)
            } else if name == "stop" {
                format!(
                    "{{\"event\": \"FROM_THE_FUTURE\", {time}}}\n\
                     {{\"return\": {{}}, \"id\": 4000}}\n\
                     {{\"event\": \"STOP\", {time}}}\n{}",
                    done(id)
                )
            } else {
                done(id)
            })
        };
        let (qmp, mut events) = connected_to(GREETING, answer).await.unwrap();
        qmp.stop().await.unwrap();
        assert_eq!(events.recv().await, Some(MachineEvent::Stopped));
        qmp.quit().await.unwrap();
    }
}
