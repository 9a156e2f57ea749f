//! Failures that hit every target: one warning when they start, and one line when they are over.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::time::Instant;

use crate::net::scrape_error::{ScrapeError, ScrapeReason};
use crate::net::vpn::unreachable_hint;

/// Failures of this many different targets count as failures of all.
const MANY_TARGETS: usize = 100;
/// Within this time every target is scraped: Prometheus forgets a sample after 5 minutes, so longer intervals do not suit it.
const SCRAPE_ROUND: Duration = Duration::from_secs(300);

/// Watches the results of scrapes.
pub struct Outages {
    /// The number of targets.
    targets: IntGauge,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Failures with one reason since the last success.
    streak: Option<(ScrapeReason, HashSet<Box<str>>)>,
    last_success: Option<Instant>,
    /// The reason of the last warning, until it is over.
    warned: Option<ScrapeReason>,
}

impl Outages {
    /// Watches this number of targets.
    pub fn new(targets: IntGauge) -> Self {
        Outages { targets, state: Mutex::default() }
    }

    /// A scrape succeeds.
    pub fn succeeded(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.streak = None;
        state.last_success = Some(Instant::now());
        state.end();
    }

    /// The scrape of this target fails.
    pub fn failed(&self, target: &str, refused: &ScrapeError) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match refused.reason {
            // These say nothing about the way to a target.
            ScrapeReason::Busy | ScrapeReason::NotTarget | ScrapeReason::BadRequest => return,
            // One failure is enough, since it has nothing to do with the target.
            ScrapeReason::NoTunnel => return state.warn(refused),
            _ if refused.status.is_some() && state.warned == Some(ScrapeReason::NoTunnel) => state.end(),
            _ => {}
        }
        if state.streak.as_ref().is_none_or(|(reason, _)| *reason != refused.reason) {
            state.streak = Some((refused.reason, HashSet::new()));
        }
        let all_were_scraped = state.last_success.is_none_or(|success| success.elapsed() >= SCRAPE_ROUND);
        let Some((_, targets)) = &mut state.streak else { return };
        let is_known = targets.contains(target);
        if !is_known && targets.len() < MANY_TARGETS {
            targets.insert(target.into());
        }
        let all = usize::try_from(self.targets.get()).unwrap_or(usize::MAX);
        if targets.len() >= all.min(MANY_TARGETS) || (is_known && all_were_scraped) {
            state.warn(refused);
        }
    }
}

impl State {
    fn warn(&mut self, refused: &ScrapeError) {
        if self.warned == Some(refused.reason) {
            return;
        }
        self.warned = Some(refused.reason);
        match refused.reason {
            ScrapeReason::NoTunnel => log::warn!("{refused}; {}", unreachable_hint(refused)),
            ScrapeReason::NoAccess => log::warn!(
                "every scrape fails: {refused}; is the API key (API_KEY) valid, and may it reach these devices?"
            ),
            _ => log::warn!("every scrape fails: {refused}"),
        }
    }

    fn end(&mut self) {
        match self.warned.take() {
            None => {}
            Some(ScrapeReason::NoTunnel) => log::info!("tunnel host reachable again"),
            Some(reason) => log::info!("scrapes succeed again (before: {reason})"),
        }
    }
}
