//! The alerts: promtool of Prometheus 2 and 3 takes the rules, the scenarios in `alerts/tests` hold, and each alert has all that
//! the person needs who gets it.

use crate::support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::alerts::{Rule, read, rule_files, rules, test_files};
use support::scenarios::{Scenario, test_rules};
use support::tools;

const RUNBOOK: &str = include_str!("../../docs/alerts.md");
const DASHBOARDS: &str = include_str!("../../docs/dashboards.md");
const RUNBOOK_URL: &str = "https://github.com/balena-io-playground/baletheus/blob/main/docs/alerts.md";

fn scenarios() -> Vec<Scenario> {
    test_files().iter().flat_map(|file| read::<Vec<Scenario>>(file)).collect()
}

fn expect_success(output: &Output, what: &str) {
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    assert!(output.status.success(), "{what}: {text}");
}

/// With `SCENARIO=words`, only those whose name has these words.
fn promtool(major: u8, mut scenarios: Vec<Scenario>) {
    let promtool = tools::prometheus(major).promtool;
    let check = Command::new(&promtool).args(["check", "rules"]).args(rule_files()).output();
    expect_success(&check.expect("promtool runs"), "promtool check rules");

    let folder = tempfile::tempdir().unwrap();
    let rules: Vec<_> = rule_files().iter().map(|file| file.display().to_string()).collect();
    let only = std::env::var("SCENARIO").unwrap_or_default();
    scenarios.retain(|scenario| scenario.name.contains(&only));
    let write = |(number, scenario): (usize, Scenario)| {
        let file = folder.path().join(format!("{number}.yml"));
        fs::write(&file, scenario.test(&rules).to_string()).unwrap();
        (scenario.name, file)
    };
    let files: Vec<_> = scenarios.into_iter().enumerate().map(write).collect();
    test_rules(major, &files);
}

#[test]
fn prometheus_3_passes_the_scenarios() {
    promtool(3, scenarios());
}

#[test]
#[ignore = "takes minutes: scripts/full scenarios"]
fn prometheus_2_passes_the_scenarios() {
    promtool(2, scenarios());
}

/// Each alert fires with its text: the shortest scenarios for that.
#[test]
fn prometheus_2_fires_each_alert() {
    let (mut scenarios, mut seen) = (scenarios(), BTreeSet::new());
    scenarios.iter_mut().for_each(Scenario::end_with_texts);
    scenarios.sort_by_key(Scenario::evaluations);
    scenarios.retain(|scenario| {
        scenario.claims().filter(|claim| claim.1 == "has a text" && seen.insert(claim.clone())).count() > 0
    });
    promtool(2, scenarios);
}

fn alerts() -> Vec<(String, Rule)> {
    let named = rules().into_iter().filter_map(|rule| Some((rule.alert.clone()?, rule)));
    named.collect()
}

/// The tests above check that the scenarios hold.
#[test]
fn each_alert_has_scenarios() {
    let scenarios = scenarios();
    let claims: BTreeSet<_> = scenarios.iter().flat_map(Scenario::claims).collect();
    let without = |what| -> Vec<String> {
        let names = alerts().into_iter().map(|(name, _)| name);
        names.filter(|name| !claims.contains(&(name.clone(), what))).collect()
    };
    assert_eq!(without("fires"), Vec::<String>::new());
    assert_eq!(without("does not fire"), ["Watchdog"]);
    assert_eq!(without("has a text"), Vec::<String>::new());
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
        assert!(text("description").ends_with(['.', '}']), "{name}: the description is no sentence");
        assert_eq!(*text("runbook_url"), format!("{RUNBOOK_URL}#{}", name.to_lowercase()), "{name}");
        assert_eq!(rule.labels.keys().collect::<Vec<_>>(), ["scope", "severity"], "{name}");
        let severities: &[&str] = if name == "Watchdog" { &["none"] } else { &["critical", "warning", "info"] };
        assert!(severities.contains(&&*rule.labels["severity"]), "{name}: {:?}", rule.labels);
        let scope = &*rule.labels["scope"];
        assert!(["device", "fleet", "discovery", "tunnel", "monitoring"].contains(&scope), "{name}: {:?}", rule.labels);
        if scope == "device" {
            // The name is not a label, since a device that renames itself would begin anew. Messages cut the summary before the bracket.
            assert!(text("summary").contains("device_name!=''"), "{name}: which device, if it has no name?");
            assert!(text("summary").contains("{{ end }} ({{ $labels.fleet }})"), "{name}: which fleet?");
            assert!(!rule.expr.contains("device_name"), "{name}: the name is a label");
        }
        let (_, entry) = entries.find(|(heading, _)| *heading == name).expect("as above");
        for part in ["**Who:** ", "**Do:** "] {
            assert!(entry.contains(part), "docs/alerts.md, {name}: no {part}");
        }
    }
}

/// The cells of the rows of the table behind this text in a document, without the table's head.
fn table(document: &'static str, before: &str) -> Vec<Vec<&'static str>> {
    let (_, rest) = document.split_once(before).unwrap_or_else(|| panic!("no {before}"));
    let rows = rest.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    rows.skip(2).map(|row| row.trim_matches(['|', ' ']).split(" | ").collect()).collect()
}

#[test]
fn the_runbook_names_the_critical_alerts() {
    let critical = alerts().into_iter().filter(|(_, rule)| rule.labels["severity"] == "critical");
    let critical: Vec<_> = critical.map(|(name, _)| name).collect();
    let (_, rest) = RUNBOOK.split_once("Critical are ").expect("the sentence");
    let (told, _) = rest.split_once('.').expect("its end");
    let words = told.split([',', ' ', '\n']).filter(|word| !["", "and"].contains(word));
    assert_eq!(words.collect::<Vec<_>>(), critical);
}

#[test]
fn the_runbook_says_which_alerts_wait() {
    let hold = regex::Regex::new(r#"device:hold\{[^}]*by=~?"([^"]+)"#).unwrap();
    // In the order of the table, which is that of records.yml.
    let held_by = ["discovery_blind", "tunnel_down", "fleet_offline", "fleet_not_scraped"];
    let waits = held_by.map(|cause| {
        let alerts = alerts().into_iter().filter(|(_, rule)| {
            hold.captures_iter(&rule.expr).any(|found| found[1].split('|').any(|held_by| held_by == cause))
        });
        alerts.map(|(name, _)| name).collect::<BTreeSet<_>>()
    });
    let told = table(RUNBOOK, "<!-- what waits").into_iter().map(|row| row[1].split(", ").map(str::to_owned).collect());
    assert_eq!(told.collect::<Vec<BTreeSet<_>>>(), waits);
}

/// The causes are those of the rule, and the one of `packaging/entrypoints/dropped.yml`.
#[test]
fn the_runbook_has_each_cause_of_monitoring_down() {
    let dropped: Value = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/entrypoints/dropped.yml"));
    let dropped = dropped["groups"][0]["rules"][0]["labels"]["cause"].as_str().expect("its cause").to_owned();
    let (_, rule) = alerts().into_iter().find(|(name, _)| name == "MonitoringDown").expect("the alert");
    let cause = regex::Regex::new(r#""cause", "([^"]+)""#).unwrap();
    let causes: Vec<_> = cause.captures_iter(&rule.expr).map(|found| found[1].to_owned()).chain([dropped]).collect();
    assert!(causes.len() > 10, "only {causes:?} are read");
    let rows = table(RUNBOOK, "\n### MonitoringDown\n");
    let told: Vec<_> = rows.iter().flat_map(|row| row[0].split("; ")).collect();
    for cause in &causes {
        assert!(told.iter().any(|told| cause.contains(told)), "docs/alerts.md, MonitoringDown: no {cause}");
    }
    for told in told {
        assert!(causes.iter().any(|cause| cause.contains(told)), "docs/alerts.md, MonitoringDown: no cause has {told}");
    }
}

#[test]
fn the_page_on_dashboards_has_each_cause_of_being_blind() {
    let cause = regex::Regex::new(r#""cause", "([^"]+)""#).unwrap();
    let blind: String = rules()
        .into_iter()
        .filter(|rule| rule.record.as_deref() == Some("discovery:blind"))
        .map(|rule| rule.expr)
        .collect();
    let causes: BTreeSet<_> = cause.captures_iter(&blind).map(|found| found[1].to_owned()).collect();
    let rows = table(DASHBOARDS, "recorded series `discovery:blind`");
    let told = rows.iter().flat_map(|row| row[0].split(", ")).map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(told, causes, "on the left docs/dashboards.md, on the right alerts/records.yml");
}

/// Alertmanager holds nothing back, and repeats a message only while it remembers it.
#[test]
fn alertmanager_only_groups_and_repeats() {
    let config: Value = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("alerts/alertmanager/alertmanager.yml"));
    assert_eq!(config["inhibit_rules"], Value::Null);
    let routes = config["route"]["routes"].as_array().expect("routes");
    for route in routes.iter().chain([&config["route"]]) {
        let repeat = route["repeat_interval"].as_str().expect("repeat_interval");
        let repeat = humantime::parse_duration(repeat).expect("a duration");
        // `--data.retention` is 120 h by default.
        assert!(repeat.as_secs() < 120 * 3600, "{route}");
    }
}
