//! Which targets could not be scraped the last time, and why.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::GaugeVec;

use crate::net::scrape_error::ScrapeReason;
use crate::text::count;
use crate::tunnel::target_list::{Exporter, TargetList};

/// The failures of the last scrapes, as a metric with a series for each.
pub struct Failures {
    known: Mutex<Known>,
    series: GaugeVec,
}

/// What is known of the exporters in the target file.
#[derive(Default)]
struct Known {
    failed: BTreeMap<Arc<Exporter>, ScrapeReason>,
    list: Arc<TargetList>,
    exporters: usize,
}

impl Failures {
    /// No failure so far.
    pub fn new(series: GaugeVec) -> Self {
        Failures { known: Mutex::default(), series }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A scrape of this exporter ends: with a failure, or without. The exporter may have left the list meanwhile.
    pub fn ended(&self, exporter: &Arc<Exporter>, failure: Option<ScrapeReason>) {
        let mut known = self.known();
        match failure.filter(|_| is_in(&known.list, exporter)) {
            Some(reason) => drop(known.failed.insert(exporter.clone(), reason)),
            None => drop(known.failed.remove(exporter)),
        }
    }

    /// Forgets exporters that the list does not have, or not with these labels.
    pub fn retain(&self, list: &Arc<TargetList>) {
        let mut known = self.known();
        known.exporters = list.values().map(|target| target.exporters.len()).sum();
        known.failed.retain(|exporter, _| is_in(list, exporter));
        known.list = list.clone();
    }

    /// Whether the last scrape of every exporter failed.
    pub fn are_of_all(&self) -> bool {
        let known = self.known();
        known.failed.len() == known.exporters
    }

    /// The same for people: a line for each exporter whose last scrape failed.
    pub fn text(&self) -> String {
        let Known { failed, exporters, .. } = &*self.known();
        let all = count(*exporters, "exporter");
        let mut text = format!("{all} in the target file; the last scrape of {} failed\n", failed.len());
        for (Exporter { job, instance, .. }, reason) in failed.iter().map(|(exporter, reason)| (&**exporter, reason)) {
            let _ = writeln!(text, "{reason}: {job} {instance}"); // into memory: cannot fail
        }
        text
    }

    /// Makes the series. Two exporters may have the same labels, if the scrape config sets others: they share a series.
    pub fn publish(&self) {
        let known = self.known();
        self.series.reset();
        let mut last = None;
        for (exporter, reason) in &known.failed {
            let labels = [&*exporter.uuid, &*exporter.job, &*exporter.instance];
            if last != Some(labels) {
                let [uuid, job, instance] = labels;
                self.series.with_label_values(&[uuid, job, instance, reason.as_str()]).set(1.0);
            }
            last = Some(labels);
        }
    }
}

fn is_in(list: &TargetList, exporter: &Arc<Exporter>) -> bool {
    list.get(&exporter.address).is_some_and(|target| target.exporters.contains(exporter))
}
