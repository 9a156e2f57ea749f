//! Which targets could not be scraped the last time, and why: as a metric, as text, and in the log when all of them fail.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Once};

use parking_lot::Mutex;
use prometheus::GaugeVec;

use crate::net::{ScrapeError, ScrapeReason, unreachable_hint};
use crate::text::count;
use crate::tunnel::target_list::{ListedExporter, TargetList};

pub struct Failures {
    known: Mutex<Known>,
    series: GaugeVec,
    /// A scrape had no place. The log says this once, since it comes and goes with each round of scrapes.
    busy: Once,
}

/// What is known of the exporters in the target file.
#[derive(Default)]
struct Known {
    failed: BTreeMap<Arc<ListedExporter>, ScrapeReason>,
    list: Arc<TargetList>,
    exporters: usize,
    /// Why the last scrape of every exporter failed, as the log says; none once one succeeds.
    all_fail: Option<ScrapeReason>,
}

impl Failures {
    pub fn new(series: GaugeVec) -> Self {
        Failures { known: Mutex::default(), series, busy: Once::new() }
    }

    /// A scrape of this exporter ends: with a failure, or without. The exporter may have left the list meanwhile.
    pub fn ended(&self, exporter: &Arc<ListedExporter>, failure: Option<ScrapeReason>) {
        let mut known = self.known.lock();
        match failure.filter(|_| is_in(&known.list, exporter)) {
            Some(reason) => drop(known.failed.insert(exporter.clone(), reason)),
            None => drop(known.failed.remove(exporter)),
        }
    }

    /// Forgets exporters that the list does not have, or not with these labels.
    pub fn retain(&self, list: &Arc<TargetList>) {
        let mut known = self.known.lock();
        known.exporters = list.values().map(|target| target.exporters.len()).sum();
        known.failed.retain(|exporter, _| is_in(list, exporter));
        known.list = list.clone();
    }

    /// Says that scrapes succeed again, if the log has said that all fail.
    pub fn log_success(&self) {
        if let Some(reason) = self.known.lock().all_fail.take() {
            log::info!("scrapes succeed again (before: {reason})");
        }
    }

    /// Says that a scrape has no place, or that with this one all fail.
    pub fn log_failure(&self, error: &ScrapeError) {
        let hint = match error.reason {
            // These say nothing about the way to a target.
            ScrapeReason::NotTarget | ScrapeReason::BadRequest => return,
            ScrapeReason::Busy => return self.busy.call_once(warn_of_busy),
            ScrapeReason::NoAccess => "; is the API key (API_KEY) valid, and may it reach these devices?",
            ScrapeReason::NoTunnel => &*format!("; {}", unreachable_hint(error)),
            _ => "",
        };
        let mut known = self.known.lock();
        if known.all_fail.is_none() && known.failed.len() == known.exporters {
            known.all_fail = Some(error.reason);
            log::warn!("every scrape fails: {error}{hint}");
        }
    }

    /// For people: a line for each exporter whose last scrape failed.
    pub fn text(&self) -> String {
        let Known { failed, exporters, .. } = &*self.known.lock();
        let all = count(*exporters, "exporter");
        let mut text = format!("{all} in the target file; the last scrape of {} failed\n", failed.len());
        for (exporter, reason) in failed {
            let _ = writeln!(text, "{reason}: {} {}", exporter.job, exporter.instance); // into memory: cannot fail
        }
        text
    }

    /// Makes the series. Two exporters may have the same labels, if the scrape config sets others: they share a series.
    pub fn publish(&self) {
        let known = self.known.lock();
        let mut series = BTreeMap::new();
        for (exporter, reason) in &known.failed {
            series.insert([&*exporter.uuid, &*exporter.job, &*exporter.instance], reason.as_str());
        }
        self.series.reset();
        for ([uuid, job, instance], reason) in series {
            self.series.with_label_values(&[uuid, job, instance, reason]).set(1.0);
        }
    }
}

fn is_in(list: &TargetList, exporter: &Arc<ListedExporter>) -> bool {
    list.get(&exporter.address).is_some_and(|target| target.exporters.contains(exporter))
}

fn warn_of_busy() {
    log::warn!(
        "too many scrapes at once: some are refused with 503; raise the memory limit or the limit for open files \
         (baletheus_tunnel_scrapes_total{{result=\"busy\"}} counts them, and no further one is logged)"
    );
}
