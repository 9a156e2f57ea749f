//! Where nothing is known, no panel shows that all is well; what is known stays.

use std::collections::BTreeMap;

use serde_json::Value;

use super::expected::{GREEN, OF_BALENA, OF_DISCOVERY, OF_EXPORTERS, State, begins, is_green};
use super::sights::{home, sights, wait_for_first_line};
use super::stack::{BOARD, Stack, own_config, troubled_fleet, two_sidecars};
use crate::support;
use support::cloud::Reply;
use support::fleet::demo_fleet;
use support::grafana::{interpolate, shown, text};
use support::sidecar::PATIENCE;

const WORKING: [&str; 5] = ["working", "working", "working", "evaluated", ""];

const NOT_KNOWN: [(&str, &str); 3] = [
    ("device: table Alerts", "Alert: Not known: see Monitoring"),
    ("fleet-overview: stat Devices", "25"),
    ("fleet-overview: table Devices", "State: put away"),
];

/// The states that balenaCloud need not know.
const UNKNOWN: [&str; 4] = ["no answer, cloud unknown", "scraped, cloud unknown", "not known", "put away"];

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
    stack.prometheus.wait_until("each sidecar has all devices", PATIENCE, |_| {
        let sights = sights(&stack, &stack.uuids[BOARD]);
        let counts: Vec<_> = sights["discovery: stat Devices"].iter().map(|(_, shown)| shown.text.clone()).collect();
        (counts == ["25", "25"]).then_some(())
    });
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
    let table = table.expect("a table");
    let expr = text(&table["targets"][0], "expr");
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
    let state = |(state, name): &(f64, String)| (shown(table, "State", Some(&state.to_string())).text, name.clone());
    assert_eq!(state(&all[24]).0, "put away");
    let cut: Vec<_> = rows("5").iter().map(state).collect();
    assert_eq!(cut.len(), 6, "{cut:?}");
    assert_eq!(cut[5].1, "More devices: raise Rows", "{cut:?}");
    assert!(cut[..5].iter().all(|(state, _)| ["online, no answer", "offline"].contains(&state.as_str())), "{cut:?}");
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
