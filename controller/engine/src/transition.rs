//! Every transition of a guest from one state to another.

use crate::{
    Action, AgentReport, Cause, Ending, Guest, GuestEvent, GuestState, Incident, Inference,
    Monotonic, OnSilence, OnViolation, Record, RogueFrame, Tunnel, TunnelReport, Witness,
};

impl Guest {
    /// Takes in what happened to the guest and adds what to do about it.
    pub(crate) fn handle(&mut self, now: Monotonic, event: GuestEvent, out: &mut Vec<Action>) {
        match event {
            GuestEvent::Launched => self.launched(now, out),
            GuestEvent::Guarded => self.guarded(now, out),
            GuestEvent::Resumed => self.resumed(now, out),
            GuestEvent::LaunchFailed { message, leftovers } => {
                self.launch_failed(now, message, leftovers, out);
            }
            GuestEvent::PublicKeyReported(key) => self.public_key_reported(now, key, out),
            GuestEvent::HandshakeSeen => self.handshake_seen(now, out),
            GuestEvent::TunnelSeen(report) => self.tunnel_seen(now, report, out),
            GuestEvent::AgentReported(report) => self.agent_reported(now, report, out),
            // Who tells of it tells of few.
            GuestEvent::ConsoleHeard(report) => {
                if !self.is_ended() {
                    self.publish(now, Record::Console(report), out);
                }
            }
            // What stands still cannot speak.
            GuestEvent::ConsoleSilent => {
                if self.state == GuestState::Running
                    && !std::mem::replace(&mut self.console_silent, true)
                {
                    self.publish(now, Record::ConsoleSilent, out);
                }
            }
            GuestEvent::FoundOutside(what) => {
                if !self.is_ended() {
                    self.publish(now, Record::Outside(what), out);
                }
            }
            GuestEvent::TunnelSilent {
                seconds,
                never,
                action,
            } => self.tunnel_silent(now, seconds, never, action, out),
            GuestEvent::TunnelBack => {
                if std::mem::take(&mut self.silent) && !self.is_ended() {
                    self.publish(now, Record::TunnelBack, out);
                }
            }
            GuestEvent::RogueFrameSeen(frame) => self.rogue_frame_seen(now, frame, out),
            GuestEvent::Paused { at } => self.paused(now, at, out),
            GuestEvent::PauseFailed { message } => self.pause_failed(now, message, out),
            GuestEvent::HoldRequested => {
                if self.state == GuestState::Running {
                    self.hold_wanted = true;
                    out.push(Action::Hold(self.id));
                }
            }
            GuestEvent::ReleaseRequested => {
                if self.state == GuestState::Held {
                    out.push(Action::Release(self.id));
                }
            }
            GuestEvent::Released => {
                if self.state == GuestState::Held {
                    self.enter(now, GuestState::Running);
                    self.publish(now, Record::Released, out);
                }
            }
            GuestEvent::ReleaseFailed { message } => {
                if self.state == GuestState::Held {
                    self.publish(now, Record::ReleaseFailed { message }, out);
                }
            }
            GuestEvent::Reset => self.reset(now, out),
            GuestEvent::Panicked => self.panicked(now, out),
            GuestEvent::GuardLost { message } => {
                self.end(now, Cause::GuardFailed, Some(message), out);
            }
            GuestEvent::StopRequested { deadline_seconds } => {
                self.stop_requested(now, deadline_seconds, out);
            }
            GuestEvent::StopDeadlinePassed => {
                if self.state == GuestState::Stopping {
                    self.end(now, Cause::StopDeadline, None, out);
                }
            }
            GuestEvent::EndRequested(cause) => self.end(now, cause, None, out),
            GuestEvent::Exited { message } => self.exited(now, message, out),
            GuestEvent::Reaped { at } => {
                if let (GuestState::Ending, Some(incident)) = (self.state, &mut self.incident) {
                    incident.ended_at.get_or_insert(at);
                }
            }
            GuestEvent::Undone {
                tap_removed_at,
                leftovers,
            } => self.undone(now, tap_removed_at, leftovers, out),
        }
    }

    fn launched(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        if self.state == GuestState::Launching {
            self.enter(now, GuestState::Paused);
            self.continue_or_end(now, Action::Guard(self.id), Record::Launched, out);
        }
    }

    fn guarded(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        if self.state == GuestState::Paused {
            self.enter(now, GuestState::Guarded);
            if self.end_wanted.is_none() {
                self.resume_ordered_at = Some(now);
            }
            self.continue_or_end(now, Action::Resume(self.id), Record::Guarded, out);
        }
    }

    fn continue_or_end(
        &mut self,
        now: Monotonic,
        action: Action,
        record: Record,
        out: &mut Vec<Action>,
    ) {
        self.publish(now, record, out);
        match self.end_wanted {
            Some(cause) => self.kill(now, cause, None, out),
            None => out.push(action),
        }
    }

    fn resumed(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        if self.state == GuestState::Guarded {
            self.enter(now, GuestState::Running);
            self.publish(now, Record::Started, out);
            if let Some(cause) = self.end_wanted {
                self.kill(now, cause, None, out);
            }
        }
    }

    fn launch_failed(
        &mut self,
        now: Monotonic,
        message: String,
        leftovers: Vec<String>,
        out: &mut Vec<Action>,
    ) {
        use GuestState::{Condemned, Ending, Guarded, Launching, Paused};
        if !matches!(
            self.state,
            Launching | Paused | Guarded | Condemned | Ending
        ) {
            return;
        }
        let cause = match &self.ending {
            Some(ending) => ending.cause,
            None => self.condemned_cause(Cause::LaunchFailed),
        };
        let incident = self.incident.clone();
        self.ending = Some(crate::Ending {
            cause,
            incident,
            message: Some(message),
            leftovers,
        });
        self.finish(now, out);
    }

    fn public_key_reported(&mut self, now: Monotonic, key: String, out: &mut Vec<Action>) {
        // A late report of a guest that no longer runs may still be the only one.
        let known = self.public_key.as_deref() == Some(key.as_str());
        if !self.has_run() || known || self.key_limiter.pass(now).is_none() {
            return;
        }
        self.handshake = false;
        self.public_key = Some(key.clone());
        self.publish(now, Record::PublicKey(key), out);
    }

    fn handshake_seen(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        if self.has_run() && self.public_key.is_some() && !self.handshake {
            self.handshake = true;
            self.publish(now, Record::Handshake, out);
        }
    }

    fn tunnel_seen(&mut self, now: Monotonic, report: TunnelReport, out: &mut Vec<Action>) {
        if !self.has_run() {
            return;
        }
        let (tunnel, tells) = Tunnel::look(self.tunnel.take(), now, report);
        self.tunnel = Some(tunnel);
        if tells {
            self.publish(now, Record::Tunnel(report), out);
        }
    }

    /// What the agent is held to account for is the guest's violation, though there is no frame to show.
    fn agent_reported(&mut self, now: Monotonic, report: AgentReport, out: &mut Vec<Action>) {
        use GuestState::{Held, Running, Stopping};
        if !matches!(self.state, Running | Held | Stopping) {
            return;
        }
        let is_violation = report.is_violation();
        // Who is powering down takes its agent, firewall and tunnel along.
        if is_violation && self.state == Stopping {
            return;
        }
        self.agent = Some(report.clone());
        let message = match report.what() {
            Some(what) => format!("its agent: {}: {what}", report.word()),
            None => format!("its agent: {}", report.word()),
        };
        self.publish(now, Record::Agent(report), out);
        if !is_violation {
            return;
        }
        match self.on_violation {
            OnViolation::Drop | OnViolation::Alert => {}
            OnViolation::Pause => {
                self.enter(now, GuestState::Condemned);
                self.hold_wanted = false;
                out.push(Action::Pause(self.id));
            }
            OnViolation::Terminate => self.kill(now, Cause::Agent, Some(message), out),
        }
    }

    /// Of a guest that stands still, or is ending, silence is to be expected.
    fn tunnel_silent(
        &mut self,
        now: Monotonic,
        seconds: u64,
        never: bool,
        action: OnSilence,
        out: &mut Vec<Action>,
    ) {
        if self.state != GuestState::Running {
            return;
        }
        self.silent = true;
        let record = Record::TunnelSilent {
            seconds,
            never,
            action,
        };
        self.publish(now, record, out);
        match action {
            OnSilence::Alert => {}
            OnSilence::Pause => {
                self.hold_wanted = true;
                out.push(Action::Hold(self.id));
            }
            OnSilence::End => {
                let message = if never {
                    format!("its consumer has not answered within {seconds} s")
                } else {
                    format!("nothing has come from its consumer for {seconds} s")
                };
                self.end(now, Cause::Silent, Some(message), out);
            }
        }
    }

    fn rogue_frame_seen(&mut self, now: Monotonic, frame: RogueFrame, out: &mut Vec<Action>) {
        let sent_since_resumed = self
            .resume_ordered_at
            .is_some_and(|ordered| frame.at >= ordered);
        if !frame.is_violation() || !sent_since_resumed || self.is_ended() {
            return;
        }
        let first = self.tally.count(frame.reason);
        let judged_by = &self.judged_by;
        let inference = self.attempts.infer(&frame, judged_by.network);
        let enough = self
            .windows
            .reached(&judged_by.thresholds, frame.reason, frame.at);
        match self.on_violation {
            OnViolation::Drop => {}
            OnViolation::Pause | OnViolation::Terminate if enough => {
                self.condemn(now, frame, inference, first, out);
            }
            // Below its threshold a frame is told of, whatever it would have led to.
            OnViolation::Alert | OnViolation::Pause | OnViolation::Terminate => {
                if let Some(suppressed) = self.tally.pass(frame.reason, now) {
                    let action = OnViolation::Alert;
                    self.publish_rogue(frame, action, inference, first, suppressed, out);
                }
            }
        }
    }

    fn condemn(
        &mut self,
        now: Monotonic,
        frame: RogueFrame,
        inference: Inference,
        first: bool,
        out: &mut Vec<Action>,
    ) {
        use GuestState::{Guarded, Held, Running, Stopping, Suspended};
        let condemned = match self.state {
            Guarded | Running | Held => true,
            Stopping => {
                self.end_wanted.get_or_insert(Cause::Stopped);
                true
            }
            // It stands still already, after a panic: only termination has anything to add.
            Suspended => self.on_violation == OnViolation::Terminate,
            _ => false,
        };
        if !condemned {
            return;
        }
        self.enter(now, GuestState::Condemned);
        self.hold_wanted = false;
        out.push(Action::Pause(self.id));
        self.incident = Some(Incident::new(frame.clone()));
        let suppressed = self.tally.pass(frame.reason, now).unwrap_or_default();
        let action = self.on_violation;
        self.publish_rogue(frame, action, inference, first, suppressed, out);
    }

    fn paused(&mut self, now: Monotonic, at: Monotonic, out: &mut Vec<Action>) {
        if self.state == GuestState::Running && std::mem::take(&mut self.hold_wanted) {
            self.enter(now, GuestState::Held);
            self.publish(at, Record::Held, out);
        }
        if self.state != GuestState::Condemned {
            return;
        }
        if let Some(incident) = &mut self.incident {
            incident.paused_at.get_or_insert(at);
        }
        if let Some(incident) = self.incident.clone() {
            self.publish(at, Record::Paused(incident), out);
        }
        match (self.on_violation, self.end_wanted) {
            (OnViolation::Terminate, _) => self.kill(now, Cause::Rogue, None, out),
            (_, Some(cause)) => self.kill(now, cause, None, out),
            (_, None) => self.enter(now, GuestState::Suspended),
        }
    }

    fn pause_failed(&mut self, now: Monotonic, message: String, out: &mut Vec<Action>) {
        if self.state == GuestState::Condemned {
            // What cannot be held still is not left running.
            self.publish(
                now,
                Record::PauseFailed {
                    message: message.clone(),
                },
                out,
            );
            let cause = match self.incident {
                Some(_) => Cause::Rogue,
                None => Cause::Agent,
            };
            self.kill(now, cause, Some(message), out);
        } else if std::mem::take(&mut self.hold_wanted) {
            self.publish(now, Record::PauseFailed { message }, out);
        }
    }

    fn reset(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        if !self.has_run() {
            return;
        }
        // The key lives in the guest's memory: the next boot makes another. A tunnel of the host's knows nothing of boots.
        let tunnel = self.tunnel.as_ref().map(|tunnel| tunnel.report.witness);
        if tunnel != Some(Witness::Host) {
            self.public_key = None;
            self.handshake = false;
            self.tunnel = None;
        }
        self.agent = None;
        if self.reset_limiter.pass(now).is_some() {
            self.publish(now, Record::Reset, out);
        }
    }

    fn panicked(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        if matches!(self.state, GuestState::Running | GuestState::Held) {
            self.hold_wanted = false;
            self.enter(now, GuestState::Suspended);
            self.publish(now, Record::Panicked, out);
        }
    }

    fn stop_requested(&mut self, now: Monotonic, deadline_seconds: u32, out: &mut Vec<Action>) {
        use GuestState::{Condemned, Guarded, Held, Launching, Paused, Running, Suspended};
        match self.state {
            Running => {
                self.hold_wanted = false;
                self.enter(now, GuestState::Stopping);
                out.push(Action::PowerDown {
                    guest: self.id,
                    deadline_seconds,
                });
                self.publish(now, Record::Stopping { deadline_seconds }, out);
            }
            // What stands still cannot power down.
            Held | Suspended => self.kill(now, Cause::Stopped, None, out),
            Launching | Paused | Guarded | Condemned => {
                self.end_wanted.get_or_insert(Cause::Stopped);
            }
            GuestState::Stopping | GuestState::Ending | GuestState::Ended => {}
        }
    }

    fn exited(&mut self, now: Monotonic, message: Option<String>, out: &mut Vec<Action>) {
        // A process that died meanwhile is no guest that powered down.
        let cause = match (self.state, &message) {
            (GuestState::Stopping, None) => Cause::Stopped,
            _ => Cause::Exited,
        };
        self.end(now, cause, message, out);
    }

    /// Ends the guest, now if nothing is under way, else after the step that is.
    fn end(
        &mut self,
        now: Monotonic,
        cause: Cause,
        message: Option<String>,
        out: &mut Vec<Action>,
    ) {
        use GuestState::{
            Condemned, Guarded, Held, Launching, Paused, Running, Stopping, Suspended,
        };
        match self.state {
            // The executor is inside a step that owns the half-made guest.
            Launching | Paused | Guarded => self.end_wanted = Some(cause),
            Running | Held | Suspended | Stopping => self.kill(now, cause, message, out),
            // The pause was ordered and may hang: the end does not wait for it.
            Condemned => self.kill(now, self.condemned_cause(cause), message, out),
            GuestState::Ending | GuestState::Ended => {}
        }
    }

    fn condemned_cause(&self, cause: Cause) -> Cause {
        match self.on_violation {
            OnViolation::Terminate if self.incident.is_some() => Cause::Rogue,
            _ => cause,
        }
    }

    fn kill(
        &mut self,
        now: Monotonic,
        cause: Cause,
        message: Option<String>,
        out: &mut Vec<Action>,
    ) {
        self.enter(now, GuestState::Ending);
        self.ending = Some(Ending {
            cause,
            incident: None,
            message,
            leftovers: Vec::new(),
        });
        out.push(Action::Kill(self.id));
    }

    fn undone(
        &mut self,
        now: Monotonic,
        tap_removed_at: Option<Monotonic>,
        leftovers: Vec<String>,
        out: &mut Vec<Action>,
    ) {
        if self.state != GuestState::Ending {
            return;
        }
        if let Some(incident) = &mut self.incident {
            incident.tap_removed_at = incident.tap_removed_at.or(tap_removed_at);
        }
        if let Some(ending) = &mut self.ending {
            ending.incident = self.incident.clone();
            ending.leftovers = leftovers;
        }
        self.finish(now, out);
    }

    fn finish(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        self.enter(now, GuestState::Ended);
        if let Some(ending) = self.ending.clone() {
            self.publish(now, Record::Ended(ending), out);
        }
    }

    const fn has_run(&self) -> bool {
        use GuestState::{Condemned, Held, Running, Stopping, Suspended};
        matches!(
            self.state,
            Running | Condemned | Held | Suspended | Stopping
        )
    }

    fn enter(&mut self, now: Monotonic, state: GuestState) {
        self.state = state;
        self.since = now;
    }

    fn publish(&self, at: Monotonic, record: Record, out: &mut Vec<Action>) {
        out.push(Action::Publish {
            guest: self.id,
            at,
            record,
        });
    }

    fn publish_rogue(
        &self,
        frame: RogueFrame,
        action: OnViolation,
        inference: Inference,
        first: bool,
        suppressed: u64,
        out: &mut Vec<Action>,
    ) {
        let at = frame.at;
        self.publish(
            at,
            Record::Rogue {
                frame,
                action,
                inference,
                first,
                suppressed,
            },
            out,
        );
    }
}
