//! Refresh after refresh: what is asked for, what is written, what is logged, and when the next one comes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use crate::support::binary::sidecar;
use crate::support::cloud::{self, Cloud, Reply, Seen, Step, recorded_devices};
use crate::support::fleet::{demo_fleet, gateway, gateways};
use crate::support::sidecar::{PATIENCE, finish};
use crate::support::status::Status;
use flate2::Compression;
use serde_json::{Value, json};

/// The requests for pages of devices.
fn pages(cloud: &Cloud) -> Vec<Seen> {
    cloud.requests().into_iter().filter(|seen| seen.target.starts_with("/v7/device?") && !asks_for_more(seen)).collect()
}

/// Whether it asks for no more than the id of the next record.
fn asks_for_more(seen: &Seen) -> bool {
    seen.target.contains("?$select=id&$filter=") && seen.target.ends_with("&$top=1")
}

/// Above which id, and how many.
fn range(seen: &Seen) -> (u64, u64) {
    let number = |before| seen.target.split_once(before).unwrap().1.split([')', '&']).next().unwrap().parse().unwrap();
    (number("(id%20gt%20"), number("$top="))
}

/// Id above which, how many, and status of each page that was asked for.
fn asked(cloud: &Cloud) -> Vec<String> {
    let show = |seen: &Seen| format!("{} {} {}", range(seen).0, range(seen).1, seen.status);
    pages(cloud).iter().map(show).collect()
}

fn targets(list: &str) -> usize {
    serde_json::from_str::<Vec<Value>>(list).expect("a list").len()
}

#[test]
fn an_unchanged_fleet_costs_a_304_and_no_write() {
    let cloud = Cloud::start(recorded_devices());
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 30 targets on 30 devices (devices: +30 -0 ~0), 0 devices left out");
    let before = fs::metadata(sidecar.path("balena.json")).unwrap();
    while asked(&cloud).len() < 4 {
        cloud.wait_for_requests(cloud.requests().len() + 1, PATIENCE);
    }
    let seen = pages(&cloud);
    assert_eq!(&asked(&cloud)[..4], ["0 1000 200", "0 1000 304", "0 1000 304", "0 1000 304"]);
    assert_eq!(seen[0].header("accept-encoding"), Some("gzip"));
    assert_eq!(seen[1].body, 0);
    running.signal("TERM");
    let (status, log) = running.wait();
    assert!(status.success());
    let after = fs::metadata(sidecar.path("balena.json")).unwrap();
    assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()), "it was written again");
    assert_eq!(log.iter().filter(|line| line.contains("balena.json")).count(), 2, "{log:#?}");
}

#[test]
fn what_changes_by_itself_is_asked_for_only_where_it_is_used() {
    let cloud = Cloud::start(recorded_devices());
    for (args, wanted) in [
        (&[][..], &[][..]),
        (&["--online-only"], &["is_connected_to_vpn"]),
        // The state says which of two devices has an address now.
        (&["--address", "lan"], &["ip_address", "is_connected_to_vpn"]),
        (&["--address", "public"], &["is_web_accessible"]),
    ] {
        cloud.clear_requests();
        sidecar(&cloud).args(args.iter().copied()).oneshot();
        let target = &pages(&cloud)[0].target;
        for field in ["is_connected_to_vpn", "ip_address", "is_web_accessible"] {
            assert_eq!(target.contains(field), wanted.contains(&field), "{args:?}: {target}");
        }
    }
}

#[test]
fn a_restart_in_place_finds_the_list_and_tells_what_changed_meanwhile() {
    let cloud = Cloud::start(recorded_devices());
    let sidecar = sidecar(&cloud);
    sidecar.oneshot();
    let (list, before) = (sidecar.list(), fs::metadata(sidecar.path("balena.json")).unwrap().ino());
    let log = sidecar.oneshot();
    assert!(
        log.contains("balena.json is up to date: 30 targets on 30 devices (devices: +0 -0 ~0), 0 devices left out"),
        "{log}"
    );
    assert_eq!(fs::metadata(sidecar.path("balena.json")).unwrap().ino(), before);
    cloud.change(|devices| {
        devices.retain(|device| device["id"] != 4);
        devices[0]["os_version"] = "balenaOS 7.0.0".into();
        devices.push(gateway(99));
    });
    let log = sidecar.oneshot();
    assert!(
        log.contains("updated balena.json: 30 targets on 30 devices (devices: +1 -1 ~1), 0 devices left out"),
        "{log}"
    );
    assert!(log.contains("changed wandering-pond (67ae729)\n"), "{log}");
    assert!(log.contains("added gw-99 (0000000): 1 target\n"), "{log}");
    assert!(log.contains("removed Überwachung – Küche 2 (8ed7dfc): the API does not list it any more\n"), "{log}");
    // line by line the same, but for these
    let (old, new) = (list, sidecar.list());
    assert_eq!(old.lines().filter(|line| !new.contains(line.trim_end_matches(','))).count(), 2);
    assert_eq!(new.lines().filter(|line| !old.contains(line.trim_end_matches(','))).count(), 2);
}

#[test]
fn devices_come_in_pages_and_only_what_changed_is_fetched_again() {
    let cloud = Cloud::start(gateways(2500));
    let sidecar = sidecar(&cloud).args(["--labels", "none"]);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2500 targets");
    assert_eq!(asked(&cloud)[..3], ["0 1000 200", "1000 1000 200", "2000 1000 200"]);

    cloud.clear_requests();
    cloud.change(|devices| devices[1500]["device_name"] = "renamed".into());
    running.wait_for("(devices: +0 -0 ~1)");
    let seen = asked(&cloud);
    let last = seen.iter().rposition(|seen| seen == "1000 1000 200").expect("the changed page");
    assert_eq!(seen[last - 1], "0 1000 304");
    cloud.wait_for_requests(last + 2, PATIENCE);
    assert_eq!(asked(&cloud)[last + 1], "2000 1000 304");

    // A device that goes from the first page moves no other page, though each answer now reaches into the next.
    cloud.change(|devices| devices.retain(|device| device["id"] != 10));
    running.wait_for("(devices: +0 -1 ~0)");
    cloud.clear_requests();
    cloud.wait_for_requests(6, PATIENCE);
    let seen = asked(&cloud);
    let start = seen.iter().position(|seen| seen.starts_with("0 ")).unwrap();
    assert_eq!(seen[start..start + 3], ["0 1000 304", "1000 1000 304", "2000 1000 304"]);

    // One that comes back into a full page moves its end, and none is lost or doubled.
    cloud.change(|devices| devices.push(gateway(10)));
    running.wait_for_lines("(devices: +1 -0 ~0)", 1);
    assert_eq!(targets(&sidecar.list()), 2500);
    let ids: Vec<String> = (1..=2500).map(|id| format!("{id:032x}.balena:80")).collect();
    let list: Vec<Value> = serde_json::from_str(&sidecar.list()).unwrap();
    assert_eq!(list.iter().map(|group| group["targets"][0].as_str().unwrap()).collect::<Vec<_>>(), ids);
}

#[test]
fn a_page_that_fails_costs_the_refresh_but_not_the_pages_before_it() {
    let cloud = Cloud::start(gateways(2500));
    let sidecar = sidecar(&cloud);
    cloud.intercept(|seen, _| seen.target.contains("gt%202000)").then(|| Reply::status(503, &[], b"")));
    let running = sidecar.start();
    running.wait_for("refresh failed: http://");
    assert!(!sidecar.path("balena.json").exists(), "a list was written from a part");
    cloud.heal();
    cloud.clear_requests();
    running.signal("HUP");
    running.wait_for("updated balena.json: 2500 targets on 2500 devices");
    assert_eq!(asked(&cloud)[..3], ["0 1000 304", "1000 1000 304", "2000 1000 200"]);
}

#[test]
fn a_page_that_is_too_large_is_asked_for_in_smaller_ones_down_to_the_device_that_is_left_out() {
    let cloud = Cloud::start(gateways(20));
    // As if device 7 had 64 MiB of tags.
    cloud.intercept(|seen, _| {
        let (after, top) = seen.target.contains("$expand").then(|| range(seen))?;
        (after < 7 && after + top >= 7).then(|| match seen.header("if-none-match") {
            Some("W/\"large\"") => Reply::status(304, &[("ETag", "W/\"large\"")], b""),
            _ => Reply::status(200, &[("ETag", "W/\"large\"")], &vec![b' '; (64 << 20) + 1]),
        })
    });
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 19 targets on 19 devices (devices: +19 -0 ~0), 1 device left out");
    let line = running.wait_for("left out gw-7 (0000000)");
    assert!(line.contains("too large"), "{line}");
    let tops: Vec<String> = asked(&cloud).iter().map(|seen| seen.split(' ').nth(1).unwrap().to_owned()).collect();
    assert_eq!(tops[..7], ["1000", "500", "250", "125", "62", "31", "15"]);
    assert!(!sidecar.list().contains(&format!("{:032x}", 7)));
    // and no 64 MiB again at the next refresh
    cloud.clear_requests();
    let seen = cloud.wait_for_requests(12, PATIENCE);
    assert_eq!(seen.iter().map(|seen| seen.body).sum::<usize>(), 0, "{:?}", asked(&cloud));
}

#[test]
fn no_targets_do_not_replace_some() {
    let cloud = Cloud::start(gateways(3));
    let sidecar = sidecar(&cloud);
    sidecar.oneshot();
    let list = sidecar.list();
    cloud.change(Vec::clear);
    let once = sidecar.command().arg("--oneshot").output().unwrap();
    assert_eq!(once.status.code(), Some(1));
    assert_eq!(sidecar.list(), list);
    let running = sidecar.start();
    let line = running.wait_for("WARN  balena.json keeps its targets");
    assert!(line.contains("WRITE_EMPTY=true"), "{line}");
    // no back-off, and no second warning: the machine may be busy, but not each time
    cloud.clear_requests();
    let seen = cloud.wait_for_requests(6, PATIENCE);
    let apart = seen.windows(2).skip(1).map(|two| two[1].at - two[0].at);
    assert!(apart.min().unwrap() < Duration::from_secs(4), "{seen:?}");
    assert_eq!(running.log().iter().filter(|line| line.contains("WARN")).count(), 2, "{:#?}", running.log());
    cloud.change(|devices| devices.extend(gateways(2)));
    running.wait_for("updated balena.json: 2 targets on 2 devices");
    drop(running);

    cloud.change(Vec::clear);
    let allowed = sidecar.env("WRITE_EMPTY", "true");
    allowed.oneshot();
    assert_eq!(allowed.list(), "[]\n");
}

#[test]
fn a_list_that_is_held_back_claims_no_removals_and_no_additions_afterwards() {
    let cloud = Cloud::start(gateways(3));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 3 targets on 3 devices (devices: +3 -0 ~0)");
    let all = cloud.change(std::mem::take);
    let line = running.wait_for("balena.json keeps its targets");
    assert!(line.contains("there would be none left: the API lists no device; if that is right"), "{line}");
    cloud.change(|devices| devices.clone_from(&all));
    running.wait_for("balena.json is up to date: 3 targets on 3 devices (devices: +0 -0 ~0), 0 devices left out");
    // All are left out at once: the warning has the reasons, and the lines of devices wait until the list changes.
    let switched_off = json!([{"tag_key": "prometheus.io/scrape", "value": "false"}]);
    cloud.change(|devices| devices.iter_mut().for_each(|device| device["device_tag"] = switched_off.clone()));
    let line = running.wait_for_lines("balena.json keeps its targets", 2);
    assert!(line.contains("none left: 3 devices left out (switched_off: 3); if"), "{line}");
    cloud.change(|devices| devices[0]["device_tag"] = json!([]));
    running.wait_for("updated balena.json: 1 target on 1 device (devices: +0 -2 ~0), 2 devices left out");
    running.wait_for_lines("left out gw-", 2);
    let log = running.log();
    for (text, lines) in [(" added ", 3), (" removed ", 0), (" left out gw-", 2), (" WARN ", 2)] {
        assert_eq!(log.iter().filter(|line| line.contains(text)).count(), lines, "{text}: {log:#?}");
    }
}

fn rename(device: &mut Value, slug: &str) {
    let fleet = &mut device["belongs_to__application"][0];
    (fleet["slug"], fleet["app_name"]) = (slug.into(), slug.split_once('/').expect("a slug").1.into());
}

#[test]
fn a_fleet_that_is_renamed_is_said_to_be_perhaps_renamed() {
    for fleet in ["acme/gateways", "gateways", "Acme/Gateways,other/gateways"] {
        let cloud = Cloud::start(gateways(3));
        cloud.change(|devices| {
            rename(&mut devices[2], "other/gateways");
            devices[2]["belongs_to__application"][0]["id"] = 2.into();
        });
        let sidecar = sidecar(&cloud).env("FLEET", fleet);
        let running = sidecar.start();
        running.wait_for("updated balena.json");
        cloud.change(|devices| devices[..2].iter_mut().for_each(|device| rename(device, "acme/edge")));
        let line = match fleet {
            // The other fleet of this name stays.
            "gateways" => running.wait_for("(devices: +0 -2 ~0)"),
            "acme/gateways" => running.wait_for("the API lists no device (was a fleet renamed? Its id survives that)"),
            _ => running.wait_for("fleet acme/gateways was asked for, but the key sees no device in it"),
        };
        assert!(fleet == "gateways" || line.contains("WARN"), "{line}");
    }
    let cloud = Cloud::start(gateways(3));
    let sidecar = sidecar(&cloud).env("FLEET", "1");
    let running = sidecar.start();
    running.wait_for("updated balena.json: 3 targets");
    cloud.change(|devices| devices.iter_mut().for_each(|device| rename(device, "acme/edge")));
    running.wait_for("updated balena.json: 3 targets on 3 devices (devices: +0 -0 ~3)");
}

/// Requests that hang are counted: each of them takes its time-out.
#[test]
fn a_database_that_hangs_costs_a_first_refresh_its_timeout_once() {
    for (command, labels) in [("--oneshot", "false"), ("--oneshot", "true"), ("check", "true")] {
        let cloud = Cloud::start(gateways(3));
        cloud.intercept(|_, _| Some(Reply::steps([Step::Hang])));
        let sidecar = sidecar(&cloud).env("API_TIMEOUT", "1s").env("SERVICE_LABELS", labels).args([command]);
        let (status, log) = sidecar.start().wait();
        assert_eq!(status.code(), Some(1), "{log:#?}");
        assert!(log.iter().any(|line| line.contains("no whole answer from") && line.contains("within 1s")), "{log:#?}");
        assert_eq!(cloud.requests().len(), 1, "{command}");
    }
}

#[test]
fn whose_key_it_is_takes_what_the_list_has_left_of_the_timeout() {
    const TIMEOUT: u64 = 4000;
    const LIST: u64 = 1500;
    let cloud = Cloud::start(gateways(1));
    cloud.intercept(|seen, due| match seen.target.as_str() {
        "/actor/v1/whoami" => Some(Reply::steps([Step::Hang])),
        _ if asks_for_more(seen) => None,
        _ => Some(Reply::steps([Step::Pause(Duration::from_millis(LIST)), Step::Send(due.to_vec())])),
    });
    let log = sidecar(&cloud).env("API_TIMEOUT", "4s").env("LOG_LEVEL", "debug").oneshot();
    let (_, limit) =
        log.split_once("whose key this is: no whole answer from ").expect("a line").1.split_once("within ").unwrap();
    let limit = limit.split(['\n', ';']).next().unwrap().replace(' ', "");
    let limit = humantime::parse_duration(&limit).expect("a duration").as_millis();
    assert!(limit <= u128::from(TIMEOUT - LIST), "{limit} ms: {log}");
    assert!(log.contains("updated balena.json: 1 target"), "{log}");
    // So does what the key sees, where the selection has no device.
    cloud.change(std::mem::take);
    cloud.intercept(|seen, due| match seen.target.as_str() {
        target if target.contains("$top=10000") => Some(Reply::steps([Step::Hang])),
        _ if asks_for_more(seen) || seen.target.starts_with("/v7/release?") => None,
        _ => Some(Reply::steps([Step::Pause(Duration::from_millis(LIST)), Step::Send(due.to_vec())])),
    });
    let sidecar = sidecar(&cloud).env("API_TIMEOUT", "4s").env("LOG_LEVEL", "debug").env("FLEET", "acme/none");
    let log = sidecar.oneshot();
    let asked = log.split("no whole answer from ").skip(1).map(|line| line.split_once("within ").expect("a limit").1);
    let limits: Vec<_> = asked.map(|limit| limit.split(['\n', ';']).next().unwrap().replace(' ', "")).collect();
    let left = Duration::from_millis(TIMEOUT - LIST);
    assert!(!limits.is_empty(), "{log}");
    assert!(limits.iter().all(|limit| humantime::parse_duration(limit).expect("a duration") <= left), "{log}");
}

/// A gateway gives 400 records at once, however many are asked for.
#[test]
fn a_page_that_is_shorter_than_asked_for_is_not_the_last_if_there_is_more() {
    let cloud = Cloud::start(gateways(1300));
    cloud.limit_answers(400);
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 1300 targets on 1300 devices");
    let shown =
        |seen: &Seen| format!("{} {}{}", range(seen).0, seen.status, if asks_for_more(seen) { " more?" } else { "" });
    let devices = |cloud: &Cloud| -> Vec<String> {
        cloud.requests().iter().filter(|seen| seen.target.starts_with("/v7/device?")).map(shown).collect()
    };
    let first = ["0 200", "400 200 more?", "400 200", "800 200", "1200 200", "1300 200 more?"];
    assert_eq!(devices(&cloud)[..6], first);
    // At rest it costs what it costs without a gateway: an answer without a body for each page.
    cloud.clear_requests();
    cloud.wait_for_requests(9, PATIENCE);
    let quiet = ["0 304", "400 304", "800 304", "1200 304"];
    let seen = devices(&cloud);
    let start = seen.iter().position(|seen| seen.starts_with("0 ")).unwrap();
    assert_eq!(seen[start..start + 4], quiet);
    // A device that goes moves no other page, and one that comes at the end is found.
    cloud.change(|devices| devices.retain(|device| device["id"] != 10));
    running.wait_for("(devices: +0 -1 ~0)");
    cloud.change(|devices| devices.push(gateway(1301)));
    running.wait_for("(devices: +1 -0 ~0)");
    let ids: Vec<String> = (1..=1301).filter(|id| *id != 10).map(|id| format!("{id:032x}.balena:80")).collect();
    let list: Vec<Value> = serde_json::from_str(&sidecar.list()).unwrap();
    assert_eq!(list.iter().map(|group| group["targets"][0].as_str().unwrap()).collect::<Vec<_>>(), ids);
    cloud.clear_requests();
    cloud.wait_for_requests(9, PATIENCE);
    let seen = devices(&cloud);
    let start = seen.iter().position(|seen| seen.starts_with("0 ")).unwrap();
    assert_eq!(seen[start..start + 4], quiet);
}

#[test]
fn the_last_page_costs_one_small_request_only_when_it_has_changed() {
    let cloud = Cloud::start(gateways(3));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    cloud.wait_for_requests(9, PATIENCE);
    let small =
        || cloud.requests().iter().filter(|seen| seen.target.starts_with("/v7/device?") && asks_for_more(seen)).count();
    assert_eq!(small(), 1);
    cloud.change(|devices| devices[0]["device_name"] = "renamed".into());
    running.wait_for("(devices: +0 -0 ~1)");
    assert_eq!(small(), 2);
}

/// Labels of services' labels and of the state come in the same way, by the same rule.
#[test]
fn releases_and_states_come_whole_from_behind_a_gateway() {
    let cloud = Cloud::start(gateways(70));
    cloud.limit_answers(20);
    cloud.change(|devices| {
        for (id, device) in (1_u64..).zip(devices) {
            device["is_running__release"] =
                json!([{ "id": id, "commit": format!("{id:06x}"), "raw_version": "1.0.0" }]);
        }
    });
    for id in 1..=70 {
        cloud.set_services(id, &[("app", &[("prometheus.io.port", "8080")], &[])]);
    }
    let sidecar = sidecar(&cloud).env("SERVICE_LABELS", "true").env("LISTEN_ADDRESS", "127.0.0.1:0");
    let status = Status::of(sidecar.start());
    status.running.wait_for("updated balena.json: 70 targets on 70 devices");
    assert!(cloud.requests().iter().all(|seen| !seen.target.contains("id%20in%20(")), "releases were missing");
    status.wait_until("all states", |metrics| {
        metrics.keys().filter(|name| name.starts_with("balena_device_online{")).count() == 70
    });
}

#[test]
fn devices_of_an_archived_fleet_are_targets_until_a_tag_of_the_fleet_says_otherwise() {
    let cloud = Cloud::start(gateways(3));
    cloud.change(|devices| devices[1]["belongs_to__application"][0]["is_archived"] = true.into());
    let sidecar = sidecar(&cloud);
    let log = sidecar.oneshot();
    assert!(log.contains("updated balena.json: 3 targets on 3 devices"), "{log}");
    assert!(pages(&cloud).iter().all(|page| !page.target.contains("archived")));
    cloud.change(|devices| {
        devices[1]["belongs_to__application"][0]["application_tag"] =
            json!([{"tag_key": "prometheus.io/scrape", "value": "false"}]);
    });
    let log = sidecar.oneshot();
    assert!(
        log.contains("updated balena.json: 2 targets on 2 devices (devices: +0 -1 ~0), 1 device left out"),
        "{log}"
    );
}

#[test]
fn an_empty_fleet_is_an_empty_list_where_no_file_stands() {
    let cloud = Cloud::start(Vec::new());
    let sidecar = sidecar(&cloud).args(["--sd-file", "new/folder/balena.json"]);
    sidecar.oneshot();
    assert_eq!(fs::read_to_string(sidecar.path("new/folder/balena.json")).unwrap(), "[]\n");
}

#[test]
fn what_cannot_be_read_as_a_list_is_replaced_by_targets_but_not_by_none() {
    let cloud = Cloud::start(Vec::new());
    let sidecar = sidecar(&cloud);
    // Prometheus keeps the targets that it had before such a file; an empty list would drop them.
    fs::write(sidecar.path("balena.json"), "[\n{\"targets\":[\"x").unwrap();
    assert_eq!(sidecar.command().arg("--oneshot").output().unwrap().status.code(), Some(1));
    cloud.change(|devices| devices.extend(gateways(1)));
    let log = sidecar.oneshot();
    assert!(log.contains("updated balena.json: 1 target on 1 device (devices: +1 -0 ~0), 0 devices left out"), "{log}");
    assert_eq!(targets(&sidecar.list()), 1);
}

#[test]
fn another_process_that_replaces_the_file_is_put_right() {
    let cloud = Cloud::start(gateways(2));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    let list = sidecar.list();
    fs::write(sidecar.path("balena.json"), "[]").unwrap();
    running.wait_for_lines("updated balena.json: 2 targets on 2 devices (devices: +0 -0 ~0)", 1);
    assert_eq!(sidecar.list(), list);
}

#[test]
fn the_log_tells_of_each_device_up_to_twenty_and_of_left_out_ones_why() {
    let cloud = Cloud::start(gateways(30));
    cloud.change(|devices| {
        devices[0]["is_connected_to_vpn"] = false.into();
        devices[1]["device_tag"] = json!([{"tag_key": "prometheus.io/scrape", "value": "no"}]);
    });
    let sidecar = sidecar(&cloud).args(["--online-only"]);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 28 targets on 28 devices (devices: +28 -0 ~0), 2 devices left out");
    running.wait_for("and 10 more such lines at log level debug");
    running.wait_for("left out gw-1 (0000000): balenaCloud sees it offline");
    running.wait_for("left out gw-2 (0000000): the tag prometheus.io/scrape switches it off");
    cloud.change(|devices| {
        devices[0]["is_connected_to_vpn"] = true.into();
        devices[2]["is_connected_to_vpn"] = false.into();
    });
    running.wait_for("updated balena.json: 28 targets on 28 devices (devices: +1 -1 ~0), 2 devices left out");
    running.wait_for("added gw-1 (0000000): 1 target");
    running.wait_for("left out gw-3 (0000000): balenaCloud sees it offline");
    assert_eq!(running.log().iter().filter(|line| line.contains("gw-2 ")).count(), 1, "told again");
    drop(running);
    let output = sidecar.env("LOG_LEVEL", "debug").command().arg("--dry-run").output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(log.lines().filter(|line| line.contains(" added ")).count(), 28, "{log}");
}

#[test]
fn a_failure_is_told_with_the_next_try_and_waits_grow() {
    let cloud = Cloud::start(gateways(1));
    let sidecar = sidecar(&cloud).env("REFRESH_RATE", "2s");
    cloud.intercept(|_, _| Some(Reply::status(502, &[("Content-Type", "text/html")], b"<html>down</html>")));
    let running = sidecar.start();
    let line = running.wait_for_lines("refresh failed", 3);
    assert!(
        line.contains("answers 502 Bad Gateway: the API is in trouble; balena.json does not exist, next try in "),
        "{line}"
    );
    // 2 s, 4 s, 8 s, and up to a quarter more
    let seen = cloud.requests();
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(2));
    assert!(seen[2].at - seen[1].at >= Duration::from_secs(4));
    assert!(["8s", "9s", "10s"].iter().any(|wait| line.ends_with(&format!("next try in {wait}"))), "{line}");
    cloud.heal();
    running.signal("HUP");
    running.wait_for("updated balena.json: 1 target on 1 device");
}

#[test]
fn retry_after_is_followed_as_seconds_and_as_a_date() {
    let date = [("Date", "Sun, 22 Nov 2026 06:59:37 GMT"), ("Retry-After", "Sun, 22 Nov 2026 06:59:40 GMT")];
    for (headers, wait) in [
        (&[("Retry-After", "3")][..], "3s"),
        // against the answer's own date, not this machine's
        (&date, "3s"),
        (&[("Retry-After", "99999999999999999999")], "1h"),
        (&[("Retry-After", "86400")], "1h"),
    ] {
        let cloud = Cloud::start(gateways(1));
        let headers = headers.to_vec();
        cloud.intercept(move |_, _| Some(Reply::status(429, &headers, b"\"Too Many Requests\"")));
        let sidecar = sidecar(&cloud);
        let running = sidecar.start();
        let line = running.wait_for("refresh failed");
        assert!(line.ends_with(&format!("next try in {wait}")), "{line}");
        assert!(line.contains("429 Too Many Requests, \"Too Many Requests\": "), "{line}");
        if wait == "3s" {
            cloud.heal();
            running.wait_for("updated balena.json");
            let seen = cloud.requests();
            assert!(seen[1].at - seen[0].at >= Duration::from_secs(3));
        }
    }
}

#[test]
fn an_answer_that_drips_or_hangs_ends_at_the_timeout() {
    for hang_after in [None, Some(0), Some(100)] {
        let cloud = Cloud::start(gateways(30));
        let sidecar = sidecar(&cloud).env("API_TIMEOUT", "2s");
        cloud.intercept(move |seen, due| {
            let drip = |byte: &u8| [Step::Send(vec![*byte]), Step::Pause(Duration::from_millis(500))];
            let steps = match hang_after {
                _ if seen.target.starts_with("/actor") => return None,
                None => due.iter().flat_map(drip).collect(),
                Some(bytes) => vec![Step::Send(due[..bytes].to_vec()), Step::Hang],
            };
            Some(Reply::steps(steps))
        });
        let running = sidecar.start();
        let line = running.wait_for("refresh failed");
        assert!(line.contains("no whole answer from http://") && line.contains(" within 2s;"), "{line}");
        assert!(!sidecar.path("balena.json").exists());
    }
}

#[test]
fn refreshes_are_counted_from_start_to_start() {
    let cloud = Cloud::start(gateways(2));
    cloud.intercept(|seen, due| {
        let pause = if asks_for_more(seen) { 0 } else { 3 };
        Some(Reply::steps(vec![Step::Pause(Duration::from_secs(pause)), Step::Send(due.to_vec())]))
    });
    let sidecar = sidecar(&cloud).env("REFRESH_RATE", "4s");
    let _running = sidecar.start();
    // Counted from the end of an answer that takes 3 s, no two of them would be less than 7 s apart.
    for requests in 3.. {
        cloud.wait_for_requests(requests, PATIENCE);
        let seen = pages(&cloud);
        let apart: Vec<_> = seen.windows(2).map(|pair| (pair[1].at - pair[0].at).as_secs_f64()).collect();
        assert!(apart.iter().all(|apart| *apart > 3.9), "{apart:?}");
        if apart.iter().any(|apart| *apart < 6.9) {
            break;
        }
        assert!(apart.len() < 20, "{apart:?}");
    }
}

#[test]
fn whose_key_it_is_gets_asked_once_after_one_device_or_none_or_a_401() {
    let asked = |cloud: &Cloud| cloud.requests().iter().filter(|seen| seen.target == "/actor/v1/whoami").count();
    let cloud = Cloud::start(recorded_devices());
    sidecar(&cloud).oneshot();
    assert_eq!(asked(&cloud), 0, "a list of 30 devices");

    cloud.add_device_key("0123456789abcdef0123456789abcdef", 1);
    // A device's own key is refused what an organization says, and shows its one device without that.
    for refuses in [true, false] {
        cloud.clear_requests();
        if !refuses {
            let body = json!({ "d": [recorded_devices()[0]] }).to_string();
            cloud.intercept(move |seen, _| {
                seen.target.contains("$expand").then(|| Reply::status(200, &[], body.as_bytes()))
            });
        }
        let output =
            sidecar(&cloud).env("API_KEY", "0123456789abcdef0123456789abcdef").command().arg("--oneshot").output();
        let log = String::from_utf8(output.unwrap().stderr).unwrap();
        assert!(log.contains("WARN  the API key is a device's own") && log.contains("create a named API key"), "{log}");
        assert_eq!(asked(&cloud), 1);
    }

    // A provisioning key, a kind of key that is not known yet, and a server that does not answer.
    let provisioning = "WARN  the API key is a provisioning key, which cannot read devices: ";
    for (actor, said) in [("application", provisioning), ("robot", ""), ("", "")] {
        let cloud = Cloud::start(gateways(1));
        cloud.intercept(move |seen, _| {
            let body = json!({ "id": 2, "actorType": actor, "actorTypeId": 2 }).to_string();
            seen.target.starts_with("/actor").then(|| Reply::status(200, &[], body.as_bytes()))
        });
        let warnings: Vec<_> =
            sidecar(&cloud).oneshot().lines().filter(|line| line.contains("WARN")).map(str::to_owned).collect();
        assert_eq!(warnings.len(), usize::from(!said.is_empty()), "{actor}: {warnings:#?}");
        assert!(warnings.iter().all(|line| line.contains(said)), "{actor}: {warnings:#?}");
    }

    let cloud = Cloud::start(gateways(1));
    cloud.intercept(|seen, _| seen.target.starts_with("/actor").then(|| Reply::status(500, &[], b"")));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    cloud.wait_for_requests(6, PATIENCE);
    assert_eq!(asked(&cloud), 1, "once a run");
    assert!(running.log().iter().all(|line| !line.contains("WARN")), "{:#?}", running.log());
}

#[test]
fn a_redirect_is_not_followed_and_says_where_it_leads() {
    let (cloud, other) = (Cloud::start(gateways(1)), Cloud::start(gateways(1)));
    let location = format!("{}/v7/device", other.url());
    let to = location.clone();
    cloud.intercept(move |_, _| Some(Reply::status(301, &[("Location", &to)], b"Moved")));
    let output = sidecar(&cloud).command().arg("--oneshot").output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(log.contains(&format!("301 Moved Permanently, to {location}: set --api-url (API_URL)")), "{log}");
    assert!(other.requests().is_empty(), "the key went to another host");
}

#[test]
fn the_first_success_after_failures_is_one_line() {
    let cloud = Cloud::start(gateways(2));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    running.wait_for_lines("refresh failed", 2);
    cloud.heal();
    running.wait_for("INFO  the refresh has succeeded again, after ");
    cloud.clear_requests();
    cloud.wait_for_requests(3, PATIENCE);
    let log = running.log();
    let failures = log.iter().filter(|line| line.contains("refresh failed")).count();
    let again: Vec<_> = log.iter().filter(|line| line.contains("succeeded again")).collect();
    assert!(again.len() == 1 && again[0].ends_with(&format!(", after {failures} failures")), "{log:#?}");
}

/// The answer with another header, and with this body instead of its own.
fn changed(due: &[u8], header: &str, body: Option<&[u8]>) -> Vec<u8> {
    let end = due.windows(4).position(|end| end == b"\r\n\r\n").expect("a head") + 2;
    let head = str::from_utf8(&due[..end]).expect("text");
    let dropped = ["content-length: ", "content-encoding: ", "transfer-encoding: "];
    let is_kept = |line: &&str| body.is_none() || !dropped.iter().any(|name| line.to_lowercase().starts_with(name));
    let mut answer: String = head.lines().filter(is_kept).map(|line| format!("{line}\r\n")).collect();
    answer += header;
    if let Some(body) = body {
        answer += &format!("Content-Length: {}\r\n", body.len());
    }
    [answer.as_bytes(), b"\r\n", body.unwrap_or(&due[end + 2..])].concat()
}

#[test]
fn a_request_is_sent_again_when_its_connection_breaks() {
    let cloud = Cloud::start(gateways(2));
    let mut number = 0;
    cloud.intercept(move |_, _| {
        number += 1;
        (number % 2 == 0).then(|| Reply::steps([Step::Close]))
    });
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2 targets");
    cloud.wait_for_requests(20, PATIENCE);
    assert!(!running.log().iter().any(|line| line.contains("WARN")), "{:#?}", running.log());
}

#[test]
fn an_answer_of_several_gzip_members_is_read() {
    let cloud = Cloud::start(Vec::new());
    let body = json!({ "d": gateways(3) }).to_string().into_bytes();
    cloud.intercept(move |seen, due| {
        if seen.target.ends_with("$top=1") {
            return None;
        }
        let parts: Vec<_> = body.chunks(100).map(|part| cloud::gzip(part, Compression::fast())).collect();
        let answer = changed(due, "Content-Encoding: gzip\r\n", Some(&parts.concat()));
        Some(Reply::steps([Step::Send(answer)]))
    });
    let sidecar = sidecar(&cloud);
    let log = sidecar.oneshot();
    assert!(log.contains("updated balena.json: 3 targets"), "{log}");
}

#[test]
fn a_cache_that_answers_with_what_is_hours_old_is_reported_once() {
    let cloud = Cloud::start(gateways(2));
    cloud.intercept(|_, due| Some(Reply::steps([Step::Send(changed(due, "Age: 10800\r\n", None))])));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2 targets");
    cloud.wait_for_requests(4, PATIENCE);
    running.signal("TERM");
    let (_, log) = running.wait();
    let warnings: Vec<_> = log.iter().filter(|line| line.contains("WARN")).collect();
    let says =
        format!("{} is answered by a cache, from 3h ago (Age): let the cache pass these requests on", cloud.url());
    assert!(warnings.len() == 1 && warnings[0].ends_with(&says), "{log:#?}");
    assert!(cloud.requests().iter().all(|seen| seen.header("cache-control") == Some("no-cache")));
}

#[test]
fn a_dry_run_that_fails_says_nothing_of_a_list_that_stays() {
    let cloud = Cloud::start(gateways(2));
    cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    let sidecar = sidecar(&cloud).args(["--dry-run"]);
    let log = String::from_utf8(finish(sidecar.command()).stderr).unwrap();
    assert!(log.trim_end().ends_with("answers 503 Service Unavailable: the API is in trouble"), "{log}");
}

#[test]
fn a_selection_without_a_device_is_explained() {
    let cloud = Cloud::start(demo_fleet());
    let sees = "the API lists no device that --fleet (FLEET) and --tag (DEVICE_TAG) select; the key sees ";
    for (args, says) in [(["--tag", "no=such"], sees), (["--fleet", "acme/none"], sees)] {
        let sidecar = sidecar(&cloud);
        let [mut once, mut check] = [sidecar.command(), sidecar.command()];
        once.args(args).arg("--oneshot");
        check.arg("check").args(args);
        let output = finish(once);
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{log}");
        let line = log.lines().find(|line| line.contains(says)).unwrap_or_else(|| panic!("{log}"));
        assert!(
            line.contains("WARN")
                && line.contains("polar-foods/cold-chain (id 1704211, 9 devices), polar-foods/gateways (id "),
            "{line}"
        );
        let output = finish(check);
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && log.contains(says), "{args:?}: {log}");
    }
    let cloud = Cloud::start(Vec::new());
    let running = sidecar(&cloud).start();
    running
        .wait_for("WARN  the API lists no device: the key sees none. Is it the key of a user who may see the fleet?");
}

#[test]
fn a_refresh_that_needs_more_requests_than_a_window_goes_on_where_it_stopped() {
    let cloud = Cloud::start(gateways(2500));
    let mut requests = 0;
    cloud.intercept(move |seen, _| {
        if !seen.target.starts_with("/v7/device?") {
            return None;
        }
        requests += 1;
        (requests % 3 == 0).then(|| Reply::status(429, &[("Retry-After", "1")], b""))
    });
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2500 targets on 2500 devices");
    let due = ["0 1000 200", "1000 1000 200", "2000 1000 429", "2000 1000 200"];
    assert_eq!(asked(&cloud)[..4], due);
}

#[test]
fn under_a_tight_rate_limit_discovery_goes_before_the_state_of_the_devices() {
    // Each request is one of discovery, or of the state of the devices.
    let is_page = |seen: &Seen| seen.target.contains("is_of__device_type");
    let is_discovery = move |seen: &Seen| is_page(seen) || seen.target.starts_with("/v7/release?");
    let cloud = Cloud::start(gateways(2000));
    let (mut requests, mut is_refused) = (0, false);
    cloud.intercept(move |seen, _| {
        // Discovery waits for the next window.
        if is_discovery(seen) && is_refused {
            (requests, is_refused) = (0, false);
        }
        requests += 1;
        is_refused |= requests > 2 && is_discovery(seen);
        (requests > 2).then(|| Reply::status(429, &[("Retry-After", "2")], b""))
    });
    let sidecar = sidecar(&cloud).env("LISTEN_ADDRESS", "127.0.0.1:0").env("DEVICE_REFRESH_RATE", "1s");
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2000 targets on 2000 devices");
    let all = cloud.requests();
    let refused =
        all.iter().position(|seen| is_discovery(seen) && seen.status == 429).expect("two requests are not enough");
    let listed = all.iter().rposition(|seen| is_page(seen) && seen.status == 200).expect("a list");
    let states = all[refused..listed].iter().filter(|seen| !is_discovery(seen) && seen.status == 200).count();
    assert_eq!(states, 0, "{all:#?}");
}
