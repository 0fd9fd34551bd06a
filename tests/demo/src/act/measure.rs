//! What the metrics tell.

use anyhow::Result;

use super::terminate::Floods;
use super::{Scene, TENANT_A, TENANT_B};
use crate::guest::Guest;
use crate::metrics;
use crate::report::Report;

impl Scene<'_> {
    /// `floods` is how many frames the captures saw of each guest's flood.
    pub(super) fn measure(&self, other: &Guest, floods: Floods, report: &mut Report) -> Result<()> {
        report.act("The metrics");
        let samples = metrics::fetch(&self.stage.provider)?;
        let allowed = self.daemon.omerta.egress(&other.interface)?.allowed;
        let dropped = |guest| {
            [
                ("guest", guest),
                ("direction", "egress"),
                ("outcome", "dropped"),
                ("reason", "endpoint"),
            ]
        };
        let (dropped_a, dropped_b) = (dropped(TENANT_A), dropped(TENANT_B));
        let exactly = |frames: usize| frames as f64..=frames as f64;
        // Of what is not known otherwise: something.
        let some = 1.0..=f64::MAX;
        for (name, labels, expected) in [
            ("omerta_build_info", &[][..], exactly(1)),
            (
                "omerta_guest_state",
                &[("guest", TENANT_B), ("state", "running")][..],
                exactly(1),
            ),
            (
                "omerta_guest_packets_total",
                &[
                    ("guest", TENANT_B),
                    ("direction", "egress"),
                    ("outcome", "allowed"),
                ],
                // Its guard was asked a moment later.
                1.0..=allowed as f64,
            ),
            (
                "omerta_guest_packets_total",
                &dropped_b,
                exactly(floods.reported),
            ),
            (
                "omerta_guest_packets_total",
                &dropped_a,
                exactly(floods.ended),
            ),
            ("omerta_guest_bytes_total", &dropped_a, some.clone()),
            (
                "omerta_rogue_events_total",
                &[("guest", TENANT_A), ("reason", "endpoint")],
                some,
            ),
        ] {
            match samples.iter().find(|sample| sample.is(name, labels)) {
                Some(sample) => report.check(expected.contains(&sample.value), &sample.line),
                None => report.check(false, &format!("{name} with {labels:?} is missing")),
            }
        }
        Ok(())
    }
}
