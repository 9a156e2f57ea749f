//! What panels should show in a state of the stack.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use super::sights::{Sight, sights};
use super::stack::{BOARD, Stack};
use crate::support::sidecar::PATIENCE;

/// Panels that are empty here while all is well.
const EMPTY: [&str; 17] = [
    "fleet-overview: table Is the newest release worse?", // takes an hour of two releases
    // All is well with the device.
    "device: table Services that do not run",
    "device: table Update",
    "device: table Why its targets fail",
    // What a simulated board does not have.
    "device: table IP addresses",
    "device: timeseries Disk I/O",
    "node-exporter: table State of the collectors",
    "node-exporter: timeseries Busy",
    "node-exporter: timeseries Errors and drops",
    "node-exporter: timeseries Inodes in use",
    "node-exporter: timeseries Interrupts and context switches",
    "node-exporter: timeseries Memory",
    "node-exporter: timeseries Open files",
    "node-exporter: timeseries Processes",
    "node-exporter: timeseries Swap",
    "node-exporter: timeseries TCP",
    "node-exporter: timeseries Throughput",
];

/// Panels that may be green while the monitoring is blind: what exporters and parts of the stack answer themselves. What
/// balenaCloud reports, and that no alert fires, is not among them.
pub const GREEN: [&str; 14] = [
    "device: stat Exporters",
    "device: stat Voltage",
    "device: state-timeline State",
    "device: table Exporters",
    "discovery: stat Age of the list", // whose colours are those of real time
    "discovery: stat Monitoring",
    "discovery: stat Services",
    "fleet-overview: bargauge Fullest disks",
    "fleet-overview: bargauge Hottest devices",
    "fleet-overview: bargauge Least memory",
    "fleet-overview: stat Monitoring",
    "fleet-overview: table Devices",
    "fleet-overview: table Side by side",
    "node-exporter: ",
];

/// What only balenaCloud knows, and that no alert fires.
pub const OF_BALENA: [&str; 10] = [
    "device: stat Alerts",
    "device: stat Heartbeat",
    "device: stat Update",
    "device: stat balenaCloud",
    "fleet-overview: stat Online",
    "fleet-overview: stat Updates pending",
    "fleet-overview: table Services that do not run",
    "fleet-overview: table Services that do not run, by release",
    "fleet-overview: table Updates under way",
    "fleet-overview: timeseries Online",
];

/// What only the sidecar knows of itself.
pub const OF_DISCOVERY: [&str; 8] = [
    "discovery: stat Age of the list",
    "discovery: stat Devices",
    "discovery: stat Targets",
    "discovery: stat Version",
    "discovery: timeseries Answers of the API",
    "discovery: timeseries How long a refresh takes",
    "discovery: timeseries Left out",
    "discovery: timeseries Refreshes",
];

/// What shows figures of exporters or of the tunnel, now or of a while ago, and whether alerts fire for the device.
pub const OF_EXPORTERS: [&str; 7] = [
    "device: stat Alerts",
    "device: stat Uptime",
    "device: timeseries ",
    "discovery: timeseries ",
    "fleet-overview: bargauge ",
    "fleet-overview: timeseries ",
    "node-exporter: ",
];

/// What panels show in a state of the stack.
pub struct State<'a> {
    /// The beginnings of the names of those that are empty besides `EMPTY`.
    pub gone: &'a [&'a str],
    /// Of those that may be.
    pub may_be_gone: &'a [&'a str],
    /// Of those that may be green.
    pub green: &'a [&'a str],
    /// What they say.
    pub said: &'a [(&'a str, &'a str)],
    /// The states in the table of devices.
    pub states: &'a [&'a str],
}

pub fn begins(panel: &str, names: &[&str]) -> bool {
    names.iter().any(|name| panel.starts_with(name))
}

/// The texts of a panel, those with a name behind it.
fn texts(sight: &Sight) -> BTreeSet<String> {
    let named = |name: &str, text: &str| if name.is_empty() { text.to_owned() } else { format!("{name}: {text}") };
    sight.iter().map(|(name, shown)| named(name, &shown.text)).collect()
}

pub fn is_green(sight: &Sight) -> bool {
    sight.iter().any(|(_, shown)| shown.color.contains("green"))
}

impl State<'_> {
    fn faults(&self, sights: &BTreeMap<String, Sight>) -> Vec<String> {
        let mut faults = Vec::new();
        for (panel, sight) in sights {
            let may_be_gone = begins(panel, &EMPTY) || begins(panel, self.may_be_gone);
            match (sight.is_empty(), begins(panel, self.gone)) {
                (true, false) if !may_be_gone => faults.push(format!("{panel} is empty")),
                (false, true) => faults.push(format!("{panel} is not empty: {:?}", texts(sight))),
                _ => {}
            }
            if is_green(sight) && !begins(panel, self.green) {
                faults.push(format!("{panel} is green: {sight:?}"));
            }
        }
        for (panel, said) in self.said {
            let texts = texts(&sights[*panel]);
            if !texts.contains(*said) {
                faults.push(format!("{panel} does not say {said}: {texts:?}"));
            }
        }
        let devices = sights["fleet-overview: table Devices"].iter().filter(|(column, _)| column == "State");
        let others: BTreeSet<_> =
            devices.map(|(_, shown)| shown.text.as_str()).filter(|state| !self.states.contains(state)).collect();
        if !others.is_empty() {
            faults.push(format!("the state of a device is {others:?}"));
        }
        faults
    }

    /// Waits for it, and fails with the faults that it saw last.
    pub fn wait(&self, stack: &Stack, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let sights = sights(stack, &stack.uuids[BOARD]);
            let faults = self.faults(&sights);
            if faults.is_empty() {
                for (panel, sight) in sights {
                    println!("{what}: {panel}: {:?}", texts(&sight)); // for who wants to see it: --nocapture
                }
                return;
            }
            assert!(Instant::now() < deadline, "{what}: {faults:#?}");
            thread::sleep(Duration::from_millis(500));
        }
    }
}
