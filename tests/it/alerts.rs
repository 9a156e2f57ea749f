//! The alerts: promtool of Prometheus 2 and 3 takes the rules and runs their unit tests, and each alert has all that
//! whom it wakes needs.

use crate::support;

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use support::alerts::{Rule, Tests, read, rule_files, rules, test_files};
use support::tools;

const RUNBOOK: &str = include_str!("../../docs/alerts.md");
const RUNBOOK_URL: &str = "https://github.com/balena-io-playground/baletheus/blob/master/docs/alerts.md";

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

/// That what they expect is so, the tests above see.
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
    assert_eq!(quiet, names, "alerts with a unit test in which they do not fire, and all alerts");

    let queries: Vec<_> = tests.iter().flat_map(|test| &test.promql_expr_test).collect();
    for record in rules().into_iter().filter_map(|rule| rule.record) {
        assert!(queries.iter().any(|query| query.expr.contains(&record)), "no unit test asks for {record}");
    }
}

#[test]
fn each_alert_tells_what_to_do() {
    let mut entries =
        RUNBOOK.split("\n### ").skip(1).map(|entry| entry.split_once('\n').expect("a heading and a text"));
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
        assert!(["critical", "warning", "info"].contains(&&*rule.labels["severity"]), "{name}: {:?}", rule.labels);
        let scope = &*rule.labels["scope"];
        assert!(["device", "fleet", "discovery", "tunnel"].contains(&scope), "{name}: {:?}", rule.labels);
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

/// Where one alert holds back another (alertmanager.yml), it has to come first, or both are sent.
#[test]
fn what_holds_others_back_comes_first() {
    let alerts = alerts();
    let hold = |name: &str| -> Duration {
        let (_, rule) = alerts.iter().find(|(alert, _)| alert == name).unwrap_or_else(|| panic!("no alert {name}"));
        let hold = rule.hold.as_deref().unwrap_or_else(|| panic!("{name} has no `for`"));
        humantime::parse_duration(hold).unwrap_or_else(|error| panic!("{name}: {hold}: {error}"))
    };
    for (name, _) in &alerts {
        hold(name);
    }
    for (first, later) in [
        ("DiscoveryDown", "DeviceDown"),
        ("DiscoveryDown", "DeviceOffline"),
        ("FleetOffline", "DeviceDown"),
        ("FleetOffline", "DeviceOffline"),
        ("FleetNotScraped", "DeviceOnlineButNotScraped"),
        ("TunnelDown", "FleetNotScraped"),
        ("TunnelFailing", "FleetNotScraped"),
        ("TunnelFailing", "DeviceOnlineButNotScraped"),
    ] {
        assert!(hold(first) + Duration::from_secs(300) <= hold(later), "{first} comes too late for {later}");
    }
    // It waits for 600 s in its expression.
    assert!(hold("DiscoveryStale") + Duration::from_secs(600 + 120) <= hold("DeviceDown"));
}
