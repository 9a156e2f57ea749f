//! What the log says of failures that are not those of one target: one warning when they start, and one line when they are over.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::net::scrape_error::{ScrapeError, ScrapeReason};
use crate::net::vpn::unreachable_hint;

/// Which warnings hold.
#[derive(Default)]
pub struct Outages(Mutex<Warned>);

#[derive(Default)]
struct Warned {
    /// The tunnel host cannot be reached.
    is_unreachable: bool,
    /// The last scrape of every target failed.
    all_fail: Option<ScrapeReason>,
    /// A scrape had no place. This is said once, since it comes and goes with each round of scrapes.
    is_busy: bool,
}

impl Outages {
    /// A scrape succeeds.
    pub fn succeeded(&self) {
        let mut warned = self.warned();
        warned.reachable();
        if let Some(reason) = warned.all_fail.take() {
            log::info!("scrapes succeed again (before: {reason})");
        }
    }

    /// A scrape fails, and with it perhaps the last of all targets.
    pub fn failed(&self, error: &ScrapeError, all_fail: bool) {
        let mut warned = self.warned();
        match error.reason {
            // These say nothing about the way to a target.
            ScrapeReason::NotTarget | ScrapeReason::BadRequest => {}
            ScrapeReason::Busy => warned.busy(),
            // One failure is enough, since it has nothing to do with the target.
            ScrapeReason::NoTunnel => warned.unreachable(error),
            _ => {
                if error.status.is_some() {
                    warned.reachable();
                }
                if all_fail {
                    warned.all_fail(error);
                }
            }
        }
    }

    fn warned(&self) -> MutexGuard<'_, Warned> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Warned {
    fn busy(&mut self) {
        if !std::mem::replace(&mut self.is_busy, true) {
            log::warn!(
                "too many scrapes at once: some are refused with 503; raise the memory limit or the limit for open files \
                 (baletheus_tunnel_scrapes_total{{result=\"busy\"}} counts them, and no further one is logged)"
            );
        }
    }

    fn unreachable(&mut self, error: &ScrapeError) {
        if !std::mem::replace(&mut self.is_unreachable, true) {
            log::warn!("{error}; {}", unreachable_hint(error));
        }
    }

    fn reachable(&mut self) {
        if std::mem::take(&mut self.is_unreachable) {
            log::info!("tunnel host reachable again");
        }
    }

    fn all_fail(&mut self, error: &ScrapeError) {
        if self.all_fail.is_some() {
            return;
        }
        self.all_fail = Some(error.reason);
        let hint = match error.reason {
            ScrapeReason::NoAccess => "; is the API key (API_KEY) valid, and may it reach these devices?",
            _ => "",
        };
        log::warn!("every scrape fails: {error}{hint}");
    }
}
