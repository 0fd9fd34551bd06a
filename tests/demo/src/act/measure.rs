//! What the metrics tell.

use anyhow::Result;

use super::{Scene, TENANT_A, TENANT_B};
use crate::metrics;
use crate::report::Report;

impl Scene<'_> {
    pub(super) fn measure(&self, report: &mut Report) -> Result<()> {
        report.act("The metrics");
        let samples = metrics::fetch(&self.stage.provider)?;
        let dropped = [
            ("guest", TENANT_A),
            ("direction", "egress"),
            ("outcome", "dropped"),
            ("reason", "endpoint"),
        ];
        for (name, labels) in [
            ("omerta_build_info", &[][..]),
            (
                "omerta_guest_state",
                &[("guest", TENANT_B), ("state", "running")][..],
            ),
            (
                "omerta_guest_packets_total",
                &[
                    ("guest", TENANT_B),
                    ("direction", "egress"),
                    ("outcome", "allowed"),
                ],
            ),
            ("omerta_guest_packets_total", &dropped),
            ("omerta_guest_bytes_total", &dropped),
            (
                "omerta_rogue_events_total",
                &[("guest", TENANT_A), ("reason", "endpoint")],
            ),
        ] {
            match samples.iter().find(|sample| sample.is(name, labels)) {
                Some(sample) => report.check(sample.value > 0.0, &sample.line),
                None => report.check(false, &format!("{name} with {labels:?} is missing")),
            }
        }
        Ok(())
    }
}
