//! What the stack stores: of the exporter of `examples/thingy` and of its own services, what rules and dashboards read, and no more.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use regex::Regex;
use serde_json::{Value, json};

use crate::support::alerts::{read, rules};
use crate::support::grafana::dashboards;
use crate::support::node_exporter::{FULL, LEAN, flags_of};
use crate::support::prometheus::{Prometheus, loopback_config};
use crate::support::raspberry;
use crate::support::sidecar::PATIENCE;

/// What is read, but not sent by the board, each with its reason.
const OF_OTHERS: [(&str, &str); 2] =
    [("node_md_disks", "a RAID"), ("node_hwmon_in_lcrit_alarm", "another name for the same")];
/// What the lean profile leaves out although a panel shows it.
const ONLY_FULL: [&str; 7] = [
    "node_filefd_allocated",
    "node_hwmon_temp_celsius",
    "node_netstat_Tcp_CurrEstab",
    "node_netstat_Tcp_RetransSegs",
    "node_pressure_cpu_waiting_seconds_total",
    "node_pressure_io_waiting_seconds_total",
    "node_pressure_memory_waiting_seconds_total",
];

/// The metrics with this prefix that a text of PromQL names.
fn names_in(text: &str, prefix: &str) -> BTreeSet<String> {
    let names = Regex::new(&format!(r"(?-u:\b){prefix}_[A-Za-z0-9_]+")).expect("an expression");
    names.find_iter(text).map(|found| found.as_str().to_owned()).collect()
}

/// All queries of the rules, and those in their messages.
fn queries_of_rules() -> String {
    let texts = rules().into_iter().map(|rule| rule.expr + " " + &rule.annotations.into_values().collect::<String>());
    texts.collect::<Vec<_>>().join("\n")
}

/// All queries of panels, variables and annotations.
fn queries_of_dashboards() -> String {
    fn walk(value: &Value, found: &mut String) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    match value {
                        Value::String(text) if ["expr", "query"].contains(&&**name) => *found += &format!("{text}\n"),
                        value => walk(value, found),
                    }
                }
            }
            Value::Array(list) => list.iter().for_each(|value| walk(value, found)),
            _ => {}
        }
    }
    let mut found = String::new();
    dashboards().iter().for_each(|dashboard| walk(&dashboard.json, &mut found));
    found
}

fn read_by_all() -> BTreeSet<String> {
    names_in(&(queries_of_rules() + &queries_of_dashboards()), "node")
}

/// The names of the series that Prometheus stores of a board with this profile, whose exporter has this job.
fn stored(profile: &str, job: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let folder = tempfile::tempdir().expect("a folder");
    let (_exporter, address) = raspberry::start(&folder.path().join("board"), &flags_of(profile));
    let config = folder.path().join("prometheus.yml");
    // Nobody has to be behind the other addresses.
    fs::write(&config, loopback_config("http://127.0.0.1:1", "127.0.0.1:1")).expect("written");
    let list = json!([{ "targets": [address.to_string()], "labels": { "job": job, "uuid": "u1" } }]);
    fs::write(folder.path().join("balena.json"), list.to_string()).expect("written");
    let prometheus = Prometheus::start(3, &config);
    prometheus.wait_until("two scrapes", PATIENCE, |prometheus| {
        let scrapes = prometheus.query("count_over_time(up{uuid='u1'}[1m]) > 1");
        (!scrapes.is_empty()).then_some(())
    });
    let series = prometheus.query("count by (__name__, __tmp_unused) ({uuid='u1', __name__=~'node_.+'})");
    let labels: BTreeSet<_> = series.iter().flat_map(|(labels, _)| labels.keys().cloned()).collect();
    (series.into_iter().map(|(mut labels, _)| labels.remove("__name__").expect("a name")).collect(), labels)
}

/// A series that a rule or a panel needs is stored, and one that nothing reads is not: it would cost memory for each device.
#[test]
fn of_an_exporter_of_the_example_what_is_read_is_stored() {
    let (stored, labels) = stored(FULL, "node");
    let read: BTreeSet<_> =
        read_by_all().into_iter().filter(|name| !OF_OTHERS.iter().any(|(other, _)| other == name)).collect();
    let help = "the regex node_(…) in prometheus.yml has what is stored";
    assert_eq!(stored.difference(&read).collect::<Vec<_>>(), [""; 0], "stored and read by nothing: {help}");
    assert_eq!(read.difference(&stored).collect::<Vec<_>>(), [""; 0], "read and not stored: {help}");
    assert_eq!(labels, ["__name__".to_owned()].into(), "no label is left over");
}

/// Dashboards of others read what ours do not.
#[test]
fn of_an_exporter_with_another_job_everything_is_stored() {
    let (stored, _) = stored(FULL, "node-full");
    for name in
        ["node_memory_Slab_bytes", "node_sockstat_TCP_alloc", "node_uname_info", "node_cpu_scaling_frequency_hertz"]
    {
        assert!(stored.contains(name), "{name}: {stored:#?}");
    }
}

/// The lean profile leaves no alert without its data.
#[test]
fn the_lean_profile_sends_all_that_alerts_read() {
    let (lean, _) = stored(LEAN, "node");
    let others = OF_OTHERS.map(|(name, _)| name.to_owned());
    let missing = |read: BTreeSet<String>| -> BTreeSet<String> {
        read.difference(&lean).filter(|name| !others.contains(name)).cloned().collect()
    };
    assert_eq!(missing(names_in(&queries_of_rules(), "node")), BTreeSet::new());
    assert_eq!(missing(read_by_all()), ONLY_FULL.map(str::to_owned).into());
}

/// Of Prometheus, Alertmanager and Grafana. The tests of the dashboards show that these names exist.
#[test]
fn of_the_services_of_the_stack_what_is_read_is_stored() {
    let config: Value = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("prometheus.yml"));
    let jobs = config["scrape_configs"].as_array().expect("jobs").iter();
    let kept =
        jobs.filter(|job| ["prometheus", "alertmanager", "grafana"].contains(&job["job_name"].as_str().unwrap()));
    let text = queries_of_rules() + &queries_of_dashboards();
    let prefixes = ["prometheus", "alertmanager", "grafana", "process", "go"];
    let read: BTreeSet<_> = prefixes.into_iter().flat_map(|prefix| names_in(&text, prefix)).collect();
    for job in kept {
        let regex = job["metric_relabel_configs"][0]["regex"].as_str().expect("what is stored");
        let regex = Regex::new(&format!("^(?:{regex})$")).expect("an expression");
        let missing: Vec<_> = read.iter().filter(|name| !regex.is_match(name)).collect();
        assert!(missing.is_empty(), "read and not stored: {missing:?}");
    }
}
