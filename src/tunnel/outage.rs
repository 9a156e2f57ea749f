//! What the log says of failures that are not those of one target.

use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use crate::net::scrape_error::{ScrapeError, ScrapeReason};
use crate::net::vpn::unreachable_hint;

/// What the log has said.
pub struct Outages {
    /// Why the last scrape of every target failed; none once one succeeds.
    all_fail: Mutex<Option<ScrapeReason>>,
    /// A scrape had no place. This is said once, since it comes and goes with each round of scrapes.
    busy: Once,
}

impl Outages {
    /// Nothing so far.
    pub fn new() -> Self {
        Outages { all_fail: Mutex::default(), busy: Once::new() }
    }

    /// A scrape succeeds.
    pub fn succeeded(&self) {
        if let Some(reason) = self.all_fail().take() {
            log::info!("scrapes succeed again (before: {reason})");
        }
    }

    /// A scrape fails, and with it perhaps the last of all targets.
    pub fn failed(&self, error: &ScrapeError, all_fail: bool) {
        let hint = match error.reason {
            // These say nothing about the way to a target.
            ScrapeReason::NotTarget | ScrapeReason::BadRequest => return,
            ScrapeReason::Busy => return self.busy.call_once(warn_of_busy),
            ScrapeReason::NoAccess => "; is the API key (API_KEY) valid, and may it reach these devices?",
            ScrapeReason::NoTunnel => &*format!("; {}", unreachable_hint(error)),
            _ => "",
        };
        let mut failed = self.all_fail();
        if all_fail && failed.is_none() {
            *failed = Some(error.reason);
            log::warn!("every scrape fails: {error}{hint}");
        }
    }

    fn all_fail(&self) -> MutexGuard<'_, Option<ScrapeReason>> {
        self.all_fail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn warn_of_busy() {
    log::warn!(
        "too many scrapes at once: some are refused with 503; raise the memory limit or the limit for open files \
         (baletheus_tunnel_scrapes_total{{result=\"busy\"}} counts them, and no further one is logged)"
    );
}
