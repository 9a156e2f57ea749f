//! The tag of a fleet that says when it is switched off.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baletheus::discovery::muting::QuietTimes;
use serde_json::json;

use crate::support::cloud::Cloud;
use crate::support::fleet::{demo_fleet, find, set_tag};
use crate::support::status::{Status, sidecar};

/// 2026-11-27T00:00:00Z was a Friday.
fn at(days: u64, hour: u64, minute: u64) -> SystemTime {
    let friday = humantime::parse_rfc3339("2026-11-27T00:00:00Z").unwrap();
    friday + Duration::from_secs(((days * 24 + hour) * 60 + minute) * 60)
}

#[test]
fn spans_of_a_day_and_of_a_week_may_pass_midnight_and_sunday() {
    let (friday, saturday, sunday, monday) = (0, 1, 2, 3);
    for (text, inside, outside) in [
        ("22:00-05:00", vec![at(friday, 22, 0), at(monday, 4, 59)], vec![at(friday, 21, 59), at(monday, 5, 0)]),
        (
            "Fri 20:00-Mon 06:00",
            vec![at(friday, 20, 0), at(saturday, 12, 0), at(monday, 5, 59), at(7, 20, 0)],
            vec![at(friday, 19, 59), at(monday, 6, 0), at(6, 23, 59)],
        ),
        (
            "12:00-13:00, sat 00:00-Sun 24:00",
            vec![at(saturday, 1, 0), at(sunday, 23, 59), at(monday, 12, 30)],
            vec![at(monday, 0, 0)],
        ),
        ("00:00-24:00", vec![at(friday, 0, 0), at(sunday, 23, 59)], vec![]),
    ] {
        let times = QuietTimes::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!(inside.iter().all(|time| times.has(*time)), "{text}");
        assert!(!outside.iter().any(|time| times.has(*time)), "{text}");
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    for (text, why) in [
        ("", "no two times"),
        ("22:00", "no two times"),
        ("22-05", "a time is"),
        ("25:00-05:00", "a time is"),
        ("22:60-23:00", "a time is"),
        ("24:01-05:00", "a time is"),
        ("9:00-10:00", "a time is"),
        ("24:00-05:00", "cannot begin"),
        ("22:00-22:00", "ends when it begins"),
        ("Fri 22:00-05:00", "has a day"),
        ("Freitag 22:00-Mon 05:00", "a day is"),
        ("22:00-05:00,", "no two times"),
        ("22:00-05:00 UTC", "a time has no zone"),
        ("22:00 CET-05:00", "a time has no zone"),
        ("22:00-05:00-06:00", "a time is"),
    ] {
        let error = QuietTimes::parse(text).expect_err(text).to_string();
        assert!(error.contains(why) && error.contains("use 22:00-05:00"), "{text}: {error}");
    }
}

#[test]
fn each_fleet_has_a_metric_and_a_bad_tag_is_warned_of() {
    let minutes = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 60;
    let clock = |minutes: u64| format!("{:02}:{:02}", minutes / 60 % 24, minutes % 60);
    let hour = 60;
    let now = format!("{}-{}", clock(minutes - hour), clock(minutes + hour));
    let later = format!("{}-{}", clock(minutes + hour), clock(minutes + 2 * hour));
    let mut devices = demo_fleet();
    for device in &mut devices {
        let fleet = &mut device["belongs_to__application"][0];
        let value = match fleet["slug"].as_str().unwrap() {
            "polar-foods/cold-chain" => &now,
            "city-lights/street-lamps" => &later,
            _ => "at night",
        };
        fleet["application_tag"]
            .as_array_mut()
            .unwrap()
            .push(json!({ "tag_key": "prometheus.io/quiet", "value": value }));
    }
    // A device must not mute its fleet.
    set_tag(find(&mut devices, "lamp-0001"), "prometheus.io/quiet", "00:00-24:00");
    let cloud = Cloud::start(devices);
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let metrics =
        status.wait_until("fleets", |metrics| metrics.keys().any(|name| name.starts_with("balena_fleet_quiet{")));
    let quiet: Vec<_> = metrics.iter().filter(|(name, _)| name.starts_with("balena_fleet_quiet{")).collect();
    assert!(quiet.len() >= 3, "{quiet:?}");
    for (name, value) in quiet {
        assert_eq!(*value, f64::from(u8::from(name.contains("polar-foods/cold-chain"))), "{name}");
    }
    let warning = status.running.wait_for("tag prometheus.io/quiet of fleet");
    assert!(warning.contains("\"at night\"") && warning.contains("use 22:00-05:00"), "{warning}");
}
