//! Where nothing is known, no panel shows that all is well; what is known stays.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::sights::{Sight, home, sights, wait_for_first_line};
use super::stack::{BOARD, Stack, own_config, troubled_fleet, two_sidecars};
use crate::support;
use support::cloud::Reply;
use support::fleet::demo_fleet;
use support::grafana::{interpolate, text};
use support::sidecar::PATIENCE;

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
const GREEN: [&str; 14] = [
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
const OF_BALENA: [&str; 10] = [
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
const OF_DISCOVERY: [&str; 8] = [
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
const OF_EXPORTERS: [&str; 7] = [
    "device: stat Alerts",
    "device: stat Uptime",
    "device: timeseries ",
    "discovery: timeseries ",
    "fleet-overview: bargauge ",
    "fleet-overview: timeseries ",
    "node-exporter: ",
];

/// What panels show in a state of the stack.
struct State<'a> {
    /// The beginnings of the names of those that are empty besides `EMPTY`.
    gone: &'a [&'a str],
    /// Of those that may be.
    may_be_gone: &'a [&'a str],
    /// Of those that may be green.
    green: &'a [&'a str],
    /// What they say.
    said: &'a [(&'a str, &'a str)],
    /// The states in the table of devices.
    states: &'a [&'a str],
}

fn begins(panel: &str, names: &[&str]) -> bool {
    names.iter().any(|name| panel.starts_with(name))
}

/// The texts of a panel, those with a name behind it.
fn texts(sight: &Sight) -> BTreeSet<String> {
    let named = |name: &str, text: &str| if name.is_empty() { text.to_owned() } else { format!("{name}: {text}") };
    sight.iter().map(|(name, shown)| named(name, &shown.text)).collect()
}

fn is_green(sight: &Sight) -> bool {
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
    fn wait(&self, stack: &Stack, what: &str) {
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

const WORKING: [&str; 5] = ["working", "working", "working", "evaluated", ""];

const NOT_KNOWN: [(&str, &str); 2] =
    [("device: table Alerts", "Alert: Not known: see Monitoring"), ("fleet-overview: stat Devices", "25")];

/// The states that balenaCloud need not know.
const UNKNOWN: [&str; 3] = ["no answer, cloud unknown", "scraped, cloud unknown", "not known"];

/// Two sidecars list the same devices, and nothing counts twice.
fn healthy(major: u8) -> Stack {
    let stack = Stack::start_with(major, troubled_fleet(), two_sidecars);
    wait_for_first_line(&stack, WORKING, &["no cause"]);
    let state = State {
        gone: &[],
        may_be_gone: &[],
        green: &[""],
        said: &[("device: table Alerts", "Alert: No alert fires"), ("fleet-overview: stat Devices", "25")],
        states: &[
            "online, no answer",
            "offline",
            "a service does not run",
            "online, no exporter",
            "online and scraped",
            "put away",
        ],
    };
    state.wait(&stack, "all is well");
    stack
}

/// Prometheus goes on to scrape exporters, and nobody knows what balenaCloud and the alerts would say.
fn a_dead_sidecar_shows(major: u8) {
    let mut stack = healthy(major);
    stack.baletheus = None; // which kills it
    wait_for_first_line(&stack, ["BLIND", "failing", "working", "evaluated", ""], &["discovery does not answer"]);
    let gone = [&OF_BALENA[..], &OF_DISCOVERY].concat();
    let state = State { gone: &gone, may_be_gone: &[], green: &GREEN, said: &NOT_KNOWN, states: &UNKNOWN };
    state.wait(&stack, "the sidecar is dead");
}

#[test]
fn a_dead_sidecar_is_no_peace() {
    a_dead_sidecar_shows(3);
}

#[test]
fn a_dead_sidecar_is_no_peace_to_prometheus_2() {
    a_dead_sidecar_shows(2);
}

#[test]
fn an_api_that_is_cut_off_and_a_dead_tunnel_are_no_peace() {
    let mut stack = healthy(3);
    stack.cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    let causes = ["the API gives no list of devices", "the API gives no state of the devices"];
    wait_for_first_line(&stack, ["BLIND", "failing", "working", "evaluated", ""], &causes);
    let rare = ["discovery: timeseries How long a refresh takes"]; // the next try is later each time
    let state = State { gone: &OF_BALENA, may_be_gone: &rare, green: &GREEN, said: &NOT_KNOWN, states: &UNKNOWN };
    state.wait(&stack, "the API is cut off");

    stack.cloud.heal();
    wait_for_first_line(&stack, WORKING, &["no cause"]);

    stack.tunnel = None;
    let causes = ["the tunnel does not answer", "no device answers"];
    wait_for_first_line(&stack, ["BLIND", "working", "failing", "evaluated", ""], &causes);
    // balenaCloud's states are as true as before.
    let green = [&GREEN[..], &OF_BALENA].concat();
    let states = ["online, no answer", "offline", "put away"];
    let state = State {
        gone: &[],
        may_be_gone: &OF_EXPORTERS,
        green: &green,
        said: &[("fleet-overview: stat Devices", "25")],
        states: &states,
    };
    state.wait(&stack, "the tunnel is dead");
}

/// What fails comes first, what was put away last, and a table that is cut says so.
#[test]
fn a_table_of_devices_that_is_cut_says_so() {
    let stack = Stack::start(3, troubled_fleet(), "2s");
    wait_for_first_line(&stack, WORKING, &["no cause"]);
    let home = home();
    let panels = home.panels();
    let table = panels.iter().find(|panel| text(panel, "title") == "Devices" && text(panel, "type") == "table");
    let expr = text(&table.expect("a table")["targets"][0], "expr");
    let rows = |rows: &str| -> Vec<(f64, String)> {
        let mut values = stack.choices(&home, "")[0].clone();
        values.insert("rows".to_owned(), rows.to_owned());
        let rows = stack.ask_values(&interpolate(expr, &values), true).into_iter();
        let mut rows: Vec<_> = rows
            .map(|(labels, state)| (state.parse::<f64>().expect("a number"), labels["device_name"].clone()))
            .collect();
        rows.sort_by(|one, other| one.0.total_cmp(&other.0));
        rows
    };
    let all = stack.prometheus.wait_until("all devices", PATIENCE, |_| {
        let all = rows("200");
        (all.len() == 25 && all.last()?.1 == "lamp-0006").then_some(all)
    });
    let cut = rows("5");
    assert_eq!(cut.len(), 6, "{cut:?}");
    assert_eq!(cut[5].1, "More devices: raise Rows", "{cut:?}");
    assert_eq!(
        cut[..5].iter().map(|(state, _)| state).collect::<Vec<_>>(),
        all[..5].iter().map(|(state, _)| state).collect::<Vec<_>>()
    );
}

/// Rules run from the first second on; nothing is scraped for minutes.
#[test]
fn a_prometheus_that_just_started_is_no_peace() {
    for major in [2, 3] {
        let stack = Stack::start(major, troubled_fleet(), "100d");
        let tiles = ["BLIND", "failing", "no target", "evaluated", "no Alertmanager"];
        wait_for_first_line(&stack, tiles, &["discovery is not scraped"]);
        let sights = sights(&stack, "");
        let green: Vec<_> = sights.iter().filter(|(_, sight)| is_green(sight)).map(|(panel, _)| panel).collect();
        assert_eq!(green, ["discovery: stat Monitoring", "fleet-overview: stat Monitoring"], "Prometheus {major}");
    }
}

#[test]
fn an_empty_fleet_is_no_peace() {
    for major in [2, 3] {
        let stack = Stack::start(major, Vec::new(), "2s");
        wait_for_first_line(&stack, ["BLIND", "failing", "no target", "evaluated", ""], &["no device is known"]);
        let up = "count(up{uuid=''} == 1) == 4";
        stack.prometheus.wait_until(up, PATIENCE, |_| (!stack.ask(up, true).is_empty()).then_some(()));
        let sights = sights(&stack, "");
        let green = sights.iter().filter(|(panel, sight)| is_green(sight) && !begins(panel, &GREEN));
        assert_eq!(green.count(), 0, "Prometheus {major}: {sights:?}");
    }
}

/// As `docs/dashboards.md` says it: the first line is green, and `instance` is what people read.
#[test]
fn ones_own_prometheus_is_enough() {
    for major in [2, 3] {
        let stack = Stack::start_with(major, demo_fleet(), own_config);
        wait_for_first_line(&stack, WORKING, &["no cause"]);
        let devices = stack.cloud.change(|devices| devices.clone());
        let name = |device: &Value| format!("{} ({:.7})", text(device, "device_name"), text(device, "uuid"));
        let names: BTreeMap<_, _> =
            devices.iter().map(|device| (text(device, "uuid").to_owned(), name(device))).collect();
        let series = stack.prometheus.wait_until("all devices", PATIENCE, |prometheus| {
            let series = prometheus.query("up{uuid!=''}");
            (series.len() > 20).then_some(series)
        });
        for (labels, _) in series {
            assert_eq!(labels["instance"], names[&labels["uuid"]], "Prometheus {major}");
        }
    }
}
