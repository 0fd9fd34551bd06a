//! Two tenants' guests boot and meet their consumers.

use std::time::Instant;

use anyhow::Result;

use super::{Scene, TENANT_A, TENANT_B};
use crate::guest::Guest;
use crate::omerta::text;
use crate::report::Report;

impl Scene<'_> {
    pub(super) fn boot(&self, report: &mut Report) -> Result<(Guest, Guest)> {
        report.act("Two guests boot");
        let omerta = &self.daemon.omerta;
        let began = Instant::now();
        let guest_a = Guest::run(omerta, TENANT_A, self.image, &self.consumer_a, "alert")?;
        let guest_b = Guest::run(omerta, TENANT_B, self.image, &self.consumer_b, "alert")?;
        // The first guest's kernel has shown by now whether KVM runs it.
        let version = omerta.json(&["version"])?;
        let served = version.get("omertad").unwrap_or(&version);
        report.say(&format!(
            "they run under {}: {}",
            text(served, "accel")?.to_uppercase(),
            text(served, "accel_why")?
        ));
        for (guest, consumer) in [(&guest_a, &self.consumer_a), (&guest_b, &self.consumer_b)] {
            guest.introduce(omerta, consumer, report)?;
            let seconds = began.elapsed().as_secs_f64();
            report.check(
                true,
                &format!(
                    "{} {} on {} shook hands with {} after {seconds:.1} s",
                    guest.name, guest.address, guest.interface, consumer.endpoint
                ),
            );
        }
        self.fetch_page(&guest_a, &self.consumer_a, report, "")?;
        self.fetch_page(&guest_b, &self.consumer_b, report, "")?;
        Ok((guest_a, guest_b))
    }
}
