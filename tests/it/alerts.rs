//! The alerts: promtool of Prometheus 2 and 3 takes the rules and runs their unit tests, and each alert has all that the person
//! needs who gets it.

use crate::support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use support::alerts::{Rule, Tests, read, rule_files, rules, test_files};
use support::tools;

const RUNBOOK: &str = include_str!("../../docs/alerts.md");
const RUNBOOK_URL: &str = "https://github.com/balena-io-playground/baletheus/blob/main/docs/alerts.md";

fn promtool(major: u8) {
    for (verb, files) in [("check", rule_files()), ("test", test_files())] {
        let output = Command::new(tools::prometheus(major).promtool).args([verb, "rules"]).args(files).output();
        let output = output.expect("promtool runs");
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(output.status.success(), "promtool {major} {verb} rules: {text}");
    }
}

#[test]
fn prometheus_2_passes_the_unit_tests() {
    promtool(2);
}

#[test]
fn prometheus_3_passes_the_unit_tests() {
    promtool(3);
}

fn alerts() -> Vec<(String, Rule)> {
    let named = rules().into_iter().filter_map(|rule| Some((rule.alert.clone()?, rule)));
    named.collect()
}

/// The tests above check that the unit tests pass.
#[test]
fn each_rule_has_unit_tests() {
    let tests: Vec<_> = test_files().iter().flat_map(|file| read::<Tests>(file).tests).collect();
    let cases = |fires: bool| -> BTreeSet<_> {
        let cases = tests.iter().flat_map(|test| &test.alert_rule_test);
        cases.filter(|case| case.exp_alerts.is_empty() != fires).map(|case| case.alertname.clone()).collect()
    };
    let (firing, quiet) = (cases(true), cases(false));
    let names: BTreeSet<_> = alerts().into_iter().map(|(name, _)| name).collect();
    assert_eq!(firing, names, "alerts with a unit test in which they fire, and all alerts");
    let silenced: BTreeSet<_> = names.iter().filter(|name| *name != "Watchdog").cloned().collect();
    assert_eq!(quiet, silenced, "alerts with a unit test in which they do not fire, and all alerts but the Watchdog");

    let queries: Vec<_> = tests.iter().flat_map(|test| &test.promql_expr_test).collect();
    for record in rules().into_iter().filter_map(|rule| rule.record) {
        assert!(queries.iter().any(|query| query.expr.contains(&record)), "no unit test asks for {record}");
    }
}

#[test]
fn each_alert_tells_what_to_do() {
    // Headings of one word; the others are about what is common to them.
    let entries = RUNBOOK.split("\n### ").skip(1).map(|entry| entry.split_once('\n').expect("a heading and a text"));
    let mut entries = entries.filter(|(heading, _)| !heading.contains(' '));
    let headings: Vec<_> = entries.clone().map(|(heading, _)| heading.to_owned()).collect();
    let names: Vec<_> = alerts().into_iter().map(|(name, _)| name).collect();
    assert_eq!(headings, names, "docs/alerts.md has a heading for each alert, in the order of the rules");

    for (name, rule) in alerts() {
        let text = |key: &str| rule.annotations.get(key).unwrap_or_else(|| panic!("{name} has no {key}"));
        assert_eq!(rule.annotations.len(), 3, "{name}: annotations {:?}", rule.annotations.keys());
        assert!(text("summary").contains("{{ $"), "{name}: the summary tells neither of whom nor how much");
        assert!(text("description").ends_with('.'), "{name}: the description is no sentence");
        assert_eq!(*text("runbook_url"), format!("{RUNBOOK_URL}#{}", name.to_lowercase()), "{name}");
        assert_eq!(rule.labels.keys().collect::<Vec<_>>(), ["scope", "severity"], "{name}");
        let severities: &[&str] = if name == "Watchdog" { &["none"] } else { &["critical", "warning", "info"] };
        assert!(severities.contains(&&*rule.labels["severity"]), "{name}: {:?}", rule.labels);
        let scope = &*rule.labels["scope"];
        assert!(["device", "fleet", "discovery", "tunnel", "monitoring"].contains(&scope), "{name}: {:?}", rule.labels);
        if scope == "device" {
            assert!(
                text("summary").contains("{{ $labels.device_name }} ({{ $labels.fleet }})"),
                "{name}: which device?"
            );
        }
        let (_, entry) = entries.find(|(heading, _)| *heading == name).expect("as above");
        for part in ["**Means:** ", "**Look at:** ", "**Do:** "] {
            assert!(entry.contains(&format!("\n{part}")), "docs/alerts.md, {name}: no {part}");
        }
    }
}

/// The alerts that `alertmanager.yml` holds back, each with those that do it.
fn inhibitions() -> Vec<(Vec<String>, Vec<String>, Vec<String>)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("alerts/alertmanager/alertmanager.yml");
    let config: Value = read(&file);
    let names = |rule: &Value, key: &str| -> Vec<String> {
        let matchers = rule[key].as_array().unwrap_or_else(|| panic!("no {key} in {rule}"));
        assert_eq!(matchers.len(), 1, "{rule}");
        let matcher = matchers[0].as_str().expect("text");
        let (_, names) = matcher.split_once('=').expect("a matcher");
        names.trim_start_matches('~').trim_matches('"').split('|').map(str::to_owned).collect()
    };
    let rules = config["inhibit_rules"].as_array().expect("rules").iter();
    let equal = |rule: &Value| -> Vec<String> {
        let equal = rule["equal"].as_array().unwrap_or_else(|| panic!("no `equal` in {rule}")).iter();
        equal.map(|label| label.as_str().expect("a label").to_owned()).collect()
    };
    rules.map(|rule| (names(rule, "source_matchers"), names(rule, "target_matchers"), equal(rule))).collect()
}

#[test]
fn an_alert_holds_back_only_those_of_its_own_stack() {
    let alerts: BTreeMap<_, _> = alerts().into_iter().collect();
    for (sources, targets, equal) in inhibitions() {
        for name in sources.iter().chain(&targets) {
            assert!(alerts.contains_key(name), "alertmanager.yml: there is no alert {name}");
        }
        assert!(equal.contains(&"stack".to_owned()), "{sources:?} holds back {targets:?} of another stack");
        let per_device = equal.contains(&"uuid".to_owned()) || equal.contains(&"fleet".to_owned());
        let of_devices = sources.iter().any(|name| ["device", "fleet"].contains(&&*alerts[name].labels["scope"]));
        assert_eq!(per_device, of_devices, "{sources:?} and {targets:?}: equal {equal:?}");
    }
}

/// Where one alert holds back another (alertmanager.yml), it has to come first, or both are sent.
#[test]
fn what_holds_others_back_comes_first() {
    let alerts = alerts();
    let hold = |name: &str| -> Duration {
        let (_, rule) = alerts.iter().find(|(alert, _)| alert == name).unwrap_or_else(|| panic!("no alert {name}"));
        let hold = rule.hold.as_deref().unwrap_or("0m");
        humantime::parse_duration(hold).unwrap_or_else(|error| panic!("{name}: {hold}: {error}"))
    };
    // What an expression needs on top of `for`, until the share of failed scrapes is reached.
    let lead = |name: &str| Duration::from_secs(if ["DiscoveryDown", "TunnelDown"].contains(&name) { 300 } else { 0 });
    for (first, later) in [
        ("DiscoveryDown", "DeviceOffline"),
        ("FleetOffline", "DeviceDown"),
        ("FleetOffline", "DeviceOffline"),
        ("FleetAsleep", "DeviceDown"),
        ("FleetNotScraped", "DeviceOnlineButNotScraped"),
        ("FleetNeverScraped", "DeviceOnlineButNotScraped"),
        ("TunnelDown", "DeviceOnlineButNotScraped"),
        ("TunnelFailing", "FleetNotScraped"),
        ("TunnelFailing", "NothingScraped"),
        ("TunnelFailing", "DeviceOnlineButNotScraped"),
        ("NothingScraped", "DeviceOnlineButNotScraped"),
        ("ScrapeRejected", "DeviceOnlineButNotScraped"),
    ] {
        let first_fires = hold(first) + lead(first) + Duration::from_secs(300);
        assert!(first_fires <= hold(later), "{first} comes too late for {later}");
    }
    // It waits for 600 s in its expression.
    assert!(hold("DiscoveryStale") + Duration::from_secs(600 + 120) <= hold("DeviceOffline"));
}
