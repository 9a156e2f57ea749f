//! Which targets could not be scraped the last time, and why.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::GaugeVec;

use crate::net::scrape_error::ScrapeReason;
use crate::text::count;
use crate::tunnel::target_list::{Exporter, TargetList};

/// The failures of the last scrapes, as a metric with a series for each.
pub struct Failures {
    failed: Mutex<BTreeMap<Arc<Exporter>, ScrapeReason>>,
    /// The number of exporters in the target file.
    listed: AtomicUsize,
    series: GaugeVec,
}

impl Failures {
    /// No failure so far.
    pub fn new(series: GaugeVec) -> Self {
        Failures { failed: Mutex::default(), listed: AtomicUsize::new(0), series }
    }

    /// A scrape of this exporter ends: with a failure, or without.
    pub fn ended(&self, exporter: &Arc<Exporter>, failure: Option<ScrapeReason>) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(reason) => drop(failed.insert(exporter.clone(), reason)),
            None => drop(failed.remove(exporter)),
        }
    }

    /// Forgets exporters that the list does not have, or not with these labels.
    pub fn retain(&self, list: &TargetList) {
        self.listed.store(list.values().map(|target| target.exporters.len()).sum(), Ordering::Relaxed);
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.retain(|exporter, _| {
            list.get(&exporter.address).is_some_and(|target| target.exporters.contains(exporter))
        });
    }

    /// Whether the last scrape of every exporter failed.
    pub fn are_of_all(&self) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.len() == self.listed.load(Ordering::Relaxed)
    }

    /// The same for people: a line for each exporter whose last scrape failed.
    pub fn text(&self) -> String {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let all = count(self.listed.load(Ordering::Relaxed), "exporter");
        let mut text = format!("{all} in the target file; the last scrape of {} failed\n", failed.len());
        for (Exporter { job, instance, .. }, reason) in failed.iter().map(|(exporter, reason)| (&**exporter, reason)) {
            let _ = writeln!(text, "{reason}: {job} {instance}"); // into memory: cannot fail
        }
        text
    }

    /// Makes the series. Two exporters may have the same labels, if the scrape config sets others: they share a series.
    pub fn publish(&self) {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        self.series.reset();
        let mut last = None;
        for (exporter, reason) in &*failed {
            let labels = [&*exporter.uuid, &*exporter.job, &*exporter.instance];
            if last != Some(labels) {
                let [uuid, job, instance] = labels;
                self.series.with_label_values(&[uuid, job, instance, reason.as_str()]).set(1.0);
            }
            last = Some(labels);
        }
    }
}
