//! Exporters that a fleet's `docker-compose.yml` declares: labels of services, on the real binary.

use std::fs;

use baletheus::discovery::exporter;
use baletheus::discovery::inventory::Inventory;
use baletheus::discovery::tags::OwnTags;
use baletheus::discovery::target::Rules;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

use crate::support::binary;
use crate::support::cloud::{Cloud, Reply, Seen, Step};
use crate::support::fakes;
use crate::support::fleet::{gateway, gateways, set_tag};
use crate::support::recording::Recording;
use crate::support::sidecar::{PATIENCE, Sidecar, finish};

/// A client of the test's own.
fn client() -> reqwest::blocking::Client {
    let _ = rustls::crypto::ring::default_provider().install_default(); // another test may have done so
    reqwest::blocking::Client::new()
}

fn sidecar(cloud: &Cloud) -> Sidecar {
    Sidecar::of(binary::path(), cloud).env("EXPORTERS", "none")
}

fn is_release(seen: &Seen) -> bool {
    seen.target.starts_with("/v7/release")
}

/// A fleet in which each device runs the release with the number of its id.
fn with_releases(count: u64) -> Vec<Value> {
    let mut devices = gateways(count);
    for device in &mut devices {
        run(device, device["id"].as_u64().unwrap());
    }
    devices
}

fn run(device: &mut Value, release: u64) {
    device["is_running__release"] = json!([{
        "id": release, "commit": format!("{release:032x}"), "raw_version": format!("{release}.0.0"),
    }]);
}

/// Name, job, service, target and path of each target.
fn targets(list: &str) -> Vec<String> {
    let groups: Vec<Value> = serde_json::from_str(list).expect("a list");
    let show = |group: &Value| {
        let labels = &group["labels"];
        let label = |name: &str| labels[name].as_str().unwrap_or("-").to_owned();
        let port = group["targets"][0].as_str().unwrap().rsplit(':').next().unwrap().to_owned();
        let path = label("__metrics_path__");
        [label("device_name"), label("job"), label("__meta_balena_service"), port, path].join(" ")
    };
    groups.iter().map(show).collect()
}

#[test]
fn labels_become_targets_of_the_devices_that_run_the_release() {
    let cloud = Cloud::start(with_releases(3));
    cloud.set_services(
        1,
        &[
            ("node-exporter", &[("prometheus.io.port", "9100"), ("prometheus.io.job", "node")], &[]),
            ("app", &[("prometheus.io.port", "8080"), ("prometheus.io.path", "/internal/metrics")], &[]),
            ("plain", &[("prometheus.iodine", "1")], &[]),
        ],
    );
    cloud.set_services(
        2,
        &[
            // Kubernetes' spelling, over which the one with a dot wins, and the owner's override, which wins over both.
            ("slash", &[("prometheus.io/port", "1"), ("prometheus.io.port", "2"), ("prometheus.io/job", "k8s")], &[]),
            (
                "over",
                &[("prometheus.io.port", "3"), ("prometheus.io.scheme", "http")],
                &[("prometheus.io.port", "4"), ("prometheus.io.scheme", "https")],
            ),
            ("spelled", &[("prometheus.io.port", "10")], &[("prometheus.io/port", "11")]),
            ("paths", &[("prometheus.io.port", "12/x"), ("prometheus.io.path", "/y")], &[]),
            ("many", &[("prometheus.io.port", "5, 6/x"), ("prometheus.io.path", "/y")], &[]),
            ("off", &[("prometheus.io.port", "7"), ("prometheus.io.scrape", "false")], &[]),
            (
                "slow",
                &[("prometheus.io.port", "8"), ("prometheus.io.interval", "2m"), ("prometheus.io.timeout", "90s")],
                &[],
            ),
            ("quick", &[("prometheus.io.port", "9"), ("prometheus.io.interval", "5s")], &[]),
        ],
    );
    let sidecar = sidecar(&cloud);
    let log = sidecar.oneshot();
    assert_eq!(
        targets(&sidecar.list()),
        [
            "gw-1 node node-exporter 9100 -",
            "gw-1 app app 8080 /internal/metrics",
            "gw-2 k8s slash 2 -",
            "gw-2 over over 4 -",
            "gw-2 spelled spelled 11 -",
            "gw-2 paths paths 12 /x",
            "gw-2 many many 5 /y",
            "gw-2 many many 6 /x",
            "gw-2 slow slow 8 -",
            "gw-2 quick quick 9 -",
        ]
    );
    let groups: Vec<Value> = serde_json::from_str(&sidecar.list()).unwrap();
    let label = |index: usize, name: &str| groups[index]["labels"][name].as_str().map(str::to_owned);
    assert_eq!(label(3, "__scheme__").as_deref(), Some("https"));
    assert_eq!(label(8, "__scrape_interval__").as_deref(), Some("2m"));
    assert_eq!(label(8, "__scrape_timeout__").as_deref(), Some("90s"));
    assert_eq!(label(9, "__scrape_timeout__").as_deref(), Some("5s"));
    assert_eq!(label(0, "__meta_balena_exporter").as_deref(), Some("node"));
    assert!(log.contains("added gw-1 (0000000): 2 targets, service label"), "{log}");
    let left_out = "left out gw-3 (0000000): no tag, no label of a service and no option names an exporter";
    assert!(log.contains(left_out), "{log}");
    assert!(log.contains("WARN  devices without an exporter are left out"), "{log}");
    for unused in [
        "service slash of release 2.0.0 of fleet acme/gateways has the label prometheus.io/port, which has no effect beside",
        "service paths of release 2.0.0 of fleet acme/gateways has the label prometheus.io.path, which has no effect: ",
    ] {
        assert!(log.contains(unused), "{log}");
    }
}

/// The device still runs it, but the API names it no more.
#[test]
fn a_release_that_was_deleted_is_a_reason() {
    let mut devices = with_releases(2);
    devices[0]["is_running__release"] = json!([]);
    run(&mut devices[1], 1);
    let cloud = Cloud::start(devices);
    cloud.set_services(1, &[("node", &[("prometheus.io.port", "9100")], &[])]);
    let log = sidecar(&cloud).oneshot();
    assert!(
        log.contains("left out gw-1 (0000000): the API has no release that it runs (was it deleted?), so"),
        "{log}"
    );
}

#[test]
fn the_first_source_that_has_exporters_provides_all_of_them() {
    let mut devices = with_releases(6);
    for device in &mut devices {
        run(device, 1);
    }
    // Each level of the order is there in addition to all below it.
    set_tag(&mut devices[0], "prometheus.io/exporters", "tag:1,tags:2");
    set_tag(&mut devices[1], "prometheus.io/port", "3");
    set_tag(&mut devices[1], "prometheus.io/path", "/three");
    let fleet_tag = |device: &mut Value, key: &str, value: &str| {
        let tags = device["belongs_to__application"][0]["application_tag"].as_array_mut().unwrap();
        tags.push(json!({ "tag_key": key, "value": value }));
    };
    for device in &mut devices[..3] {
        fleet_tag(device, "prometheus.io/exporters", "fleet:4");
    }
    set_tag(&mut devices[3], "prometheus.io/exporters", "not a port"); // counts as absent
    set_tag(&mut devices[3], "prometheus.io/scheme", "https"); // overrides by itself
    run(&mut devices[4], 2);
    devices[5]["is_running__release"] = json!([]);
    let cloud = Cloud::start(devices);
    cloud.set_services(1, &[("app", &[("prometheus.io.port", "5"), ("prometheus.io.scheme", "http")], &[])]);
    let sidecar = sidecar(&cloud).env("EXPORTERS", "option:6").env("OWN_TAGS", "all");
    let log = sidecar.oneshot();
    assert_eq!(
        targets(&sidecar.list()),
        [
            "gw-1 tag - 1 -",
            "gw-1 tags - 2 -",
            "gw-2 - - 3 /three",
            "gw-3 fleet - 4 -",
            "gw-4 app app 5 -",
            "gw-5 option - 6 -",
            "gw-6 option - 6 -",
        ]
    );
    let groups: Vec<Value> = serde_json::from_str(&sidecar.list()).unwrap();
    assert_eq!(groups[4]["labels"]["__scheme__"], "https");
    for (name, from) in [("gw-1", ", device tag"), ("gw-3", ", fleet tag"), ("gw-4", ", service label"), ("gw-5", "")] {
        let line = log.lines().find(|line| line.contains(&format!("added {name} "))).expect("a line");
        assert!(line.ends_with(&format!("{}{from}", line.split(", ").next().unwrap())), "{line}");
    }
    // The same without labels: no request for them.
    cloud.clear_requests();
    let log = sidecar.args(["--service-labels=false"]).oneshot();
    assert!(!cloud.requests().iter().any(is_release), "{log}");
}

#[test]
fn a_service_that_cannot_be_understood_is_named_once_and_does_not_affect_the_others() {
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("port", "http")], "its label prometheus.io.port is"),
        (&[("port", "")], "names no port"),
        (&[("port", "name:80")], "is not PORT[/PATH]"),
        (&[("port", "0")], "has no port from 1 to 65535"),
        (&[("port", "80"), ("path", "metrics")], "does not begin with /"),
        (&[("port", "80"), ("path", "/a?b=c")], "has a query, which a target cannot carry"),
        (&[("port", "80"), ("path", "/a#b")], "is not a plain path"),
        (&[("port", "80"), ("job", "two words")], "its label prometheus.io.job is \"two words\": it is not 1 to 64 of"),
        (&[("port", "80"), ("job", "baletheus")], "its label prometheus.io.job is \"baletheus\": it is reserved"),
        (&[("port", "80"), ("scheme", "ftp")], "its label prometheus.io.scheme is \"ftp\": not one of http, https"),
        (&[("port", "80"), ("interval", "10s"), ("timeout", "0s")], "it has to be longer than 0s"),
        (&[("port", "80"), ("interval", "1s")], "is shorter than 5s"),
        (&[("port", "80"), ("interval", "soon")], "it is not a duration of Prometheus"),
        (&[("port", "80"), ("timeout", "5s")], "it needs an interval"),
        (&[("port", "80"), ("interval", "10s"), ("timeout", "11s")], "longer than the interval"),
        (&[("port", "80"), ("scrape", "")], "its label prometheus.io.scrape is \"\": not a boolean"),
        (&[("path", "/metrics")], "it has no label prometheus.io.port"),
        (&[("port", "80"), ("prot", "x")], "has the label prometheus.io.prot, which baletheus does not know"),
    ];
    let mut devices = with_releases(cases.len() as u64 + 1);
    run(devices.last_mut().unwrap(), 1); // a neighbour with the same release: the warning is not repeated
    let cloud = Cloud::start(devices);
    for (release, (labels, _)) in (1..).zip(cases) {
        let labels: Vec<_> = labels.iter().map(|(name, value)| (format!("prometheus.io.{name}"), *value)).collect();
        let labels: Vec<_> = labels.iter().map(|(name, value)| (&**name, *value)).collect();
        cloud.set_services(release, &[("bad", &labels, &[]), ("good", &[("prometheus.io.port", "9")], &[])]);
    }
    let sidecar = sidecar(&cloud).env("LOG_LEVEL", "debug");
    let running = sidecar.start();
    running.wait_for_lines("balena.json is unchanged", 2);
    running.signal("TERM");
    let (_, log) = running.wait();
    for (release, (labels, said)) in (1..).zip(cases) {
        let place = format!("service bad of release {release}.0.0 of fleet acme/gateways");
        let lines: Vec<_> = log.iter().filter(|line| line.contains(&place)).collect();
        assert!(lines.len() == 1 && lines[0].contains(said), "{labels:?}: {said}: {lines:#?}");
    }
    let listed = targets(&sidecar.list());
    let good = listed.iter().filter(|target| target.ends_with("good good 9 -")).count();
    assert_eq!(good, cases.len() + 1, "{listed:#?}");
}

#[test]
fn of_more_exporters_than_a_device_may_have_the_first_are_scraped() {
    let cloud = Cloud::start(with_releases(1));
    let port = [("prometheus.io.port", "9100")];
    let names: Vec<_> = (10..27).map(|number| format!("app-{number}")).collect();
    let services: Vec<_> = names.iter().map(|name| (&**name, &port[..], &[][..])).collect();
    cloud.set_services(1, &services);
    let sidecar = sidecar(&cloud);
    let log = sidecar.oneshot();
    assert!(
        log.contains("release 1.0.0 of fleet acme/gateways declares more than 16 exporters; the first 16 are scraped"),
        "{log}"
    );
    let listed: Vec<_> =
        targets(&sidecar.list()).iter().map(|target| target.split(' ').nth(1).unwrap().to_owned()).collect();
    assert_eq!(listed, names[..16]);
}

#[test]
fn what_is_not_read_of_a_release_is_named() {
    let cloud = Cloud::start(with_releases(1));
    let label = |name: &str, value: &str| json!({ "label_name": name, "value": value });
    let service = |name: &str, labels: Vec<Value>| {
        let service = json!({ "id": 1, "service_name": name, "service_label": [] });
        json!({ "id": 1, "image": [{ "id": 1, "is_a_build_of__service": [service] }], "image_label": labels })
    };
    let near =
        ["Prometheus.io/port", "io.prometheus/port", "prometheus.io.Port", "prometheus.io/ports", "prometheus/port"];
    let mut images = vec![
        json!({ "id": 1, "image": [], "image_label": [label("prometheus.io.port", "1")] }),
        service("long", vec![label("prometheus.io.port", &"2".repeat(1201))]),
        service("many", (0..51).map(|n| label(&format!("prometheus{n:02}"), "")).collect()),
        service("near", near.iter().map(|name| label(name, "3")).collect()),
    ];
    images.resize_with(201, || service("plain", Vec::new()));
    cloud.set_images(1, images);
    let sidecar = sidecar(&cloud).env("EXPORTERS", "80");
    let log = sidecar.oneshot();
    let of = "release 1.0.0 of fleet acme/gateways";
    let mut due = vec![
        format!("{of}: it has 201 services; the first 200 are read"),
        format!("{of}: the key may not see the name of a service, so the labels of that service are not read"),
        format!("{of}: label prometheus.io.port of service long has more than 1200 bytes and is not read"),
        format!("{of}: service many has 51 labels; the first 50 are read"),
    ];
    let near = near.map(|name| format!("service near of {of} has the label {name}, which baletheus does not know"));
    due.extend(near);
    let mut warnings: Vec<_> = log.lines().filter_map(|line| Some(line.split_once(" WARN  ")?.1)).collect();
    warnings.sort_unstable();
    due.sort_unstable();
    assert_eq!(warnings, due);
    assert_eq!(targets(&sidecar.list()), ["gw-1 - - 80 -"]);
}

/// Which requests came since the last look, as resource and status.
fn asked(cloud: &Cloud) -> Vec<String> {
    let all = cloud.requests();
    cloud.clear_requests();
    let show = |seen: &Seen| {
        let resource = seen.target.split(['?', '/']).nth(2).unwrap_or_default().to_owned();
        let by_id = if seen.target.contains("id%20in%20(") { " by id" } else { "" };
        // Behind a new page that is not full: is there one more record?
        let more = if seen.target.contains("?$select=id&$filter=") { " more" } else { "" };
        format!("{resource}{by_id}{more} {}", seen.status)
    };
    all.iter().map(show).collect()
}

#[test]
fn a_quiet_fleet_costs_one_more_304_and_a_label_costs_the_devices_that_run_its_release() {
    let mut devices = with_releases(1500);
    for device in &mut devices[..1400] {
        run(device, 1);
    }
    let cloud = Cloud::start(devices);
    cloud.set_services(1, &[("app", &[("prometheus.io.port", "80")], &[])]);
    cloud.set_services(1450, &[("app", &[("prometheus.io.port", "80")], &[])]);
    let sidecar = sidecar(&cloud).env("REFRESH_RATE", "1h");
    let running = sidecar.start();
    running.wait_for("1401 targets on 1401 devices");
    let first = ["release 200", "release more 200", "device 200", "device 200", "device more 200"];
    assert_eq!(asked(&cloud), first);
    let refresh = |cloud: &Cloud, requests: usize| {
        running.signal("HUP");
        cloud.wait_for_requests(requests, PATIENCE);
        asked(cloud)
    };
    assert_eq!(refresh(&cloud, 3), ["release 304", "device 304", "device 304"]);
    // Only the second page has a device that runs this release. It is downloaded again, since its ETag is what it was.
    cloud.set_services(1450, &[("app", &[("prometheus.io.port", "81")], &[])]);
    let label = ["release 200", "release more 200", "device 304", "device 200", "device more 200"];
    assert_eq!(refresh(&cloud, 5), label);
    running.wait_for("(devices: +0 -0 ~1)");
    running.wait_for("changed gw-1450");
    assert_eq!(refresh(&cloud, 3), ["release 304", "device 304", "device 304"]);
    // The owner overrides a label; nothing else has changed.
    let before = fs::read_to_string(sidecar.path("balena.json")).unwrap();
    cloud.set_services(1450, &[("app", &[("prometheus.io.port", "81")], &[("prometheus.io.port", "82")])]);
    assert_eq!(refresh(&cloud, 5), label);
    running.wait_for_lines("changed gw-1450", 2);
    let after = fs::read_to_string(sidecar.path("balena.json")).unwrap();
    assert_eq!(before.replace(":81\"", ":82\""), after);
    // A rollout: two devices get a release that has one exporter more.
    cloud.set_services(
        2000,
        &[("app", &[("prometheus.io.port", "80")], &[]), ("new", &[("prometheus.io.port", "90")], &[])],
    );
    cloud.change(|devices| devices[..2].iter_mut().for_each(|device| run(device, 2000)));
    assert_eq!(refresh(&cloud, 4), ["release 200", "release more 200", "device 200", "device 304"]);
    running.wait_for("1403 targets on 1401 devices (devices: +0 -0 ~2)");
}

#[test]
fn a_failing_request_for_labels_fails_the_refresh_and_the_file_stays() {
    let faults: Vec<(&str, Reply, &str)> = vec![
        ("401", Reply::status(401, &[], b""), "may read devices, but not releases (the API answers 401)"),
        ("403", Reply::status(403, &[], b""), "may read devices, but not releases (the API answers 403)"),
        ("500", Reply::status(500, &[], b""), "500 Internal Server Error"),
        ("429", Reply::status(429, &[("Retry-After", "1")], b""), "429 Too Many Requests"),
        ("hang", Reply::steps([Step::Hang]), "no whole answer"),
        ("html", Reply::status(200, &[], b"<html>"), "is no page of releases"),
        ("shape", Reply::status(200, &[], br#"{"d":{}}"#), "is no page of releases"),
        (
            "one broken release",
            Reply::status(200, &[], br#"{"d":[{"id":1,"release_image":7}]}"#),
            "is no page of releases: release 1 cannot be read: invalid type",
        ),
        ("ids", Reply::status(200, &[], br#"{"d":[{"id":2},{"id":1}]}"#), "the ids do not rise"),
        ("empty", Reply::status(200, &[], br#"{"d":[]}"#), "and the API does not list it"),
    ];
    for (name, reply, said) in faults {
        let cloud = Cloud::start(with_releases(2));
        cloud.set_services(1, &[("app", &[("prometheus.io.port", "80")], &[])]);
        let sidecar = sidecar(&cloud);
        let sidecar = if name == "hang" { sidecar.env("API_TIMEOUT", "2s") } else { sidecar };
        let running = sidecar.start();
        running.wait_for("updated balena.json: 1 target");
        let before = sidecar.list();
        let mut reply = Some(reply);
        // Only the first request meets the fault, and it asks for everything: no device has to change for that.
        cloud.change(|devices| devices[1]["device_name"] = "another".into());
        cloud.set_services(1, &[("app", &[("prometheus.io.port", "81")], &[])]);
        cloud.intercept(
            move |seen, _| if is_release(seen) && !seen.target.contains("in%20(") { reply.take() } else { None },
        );
        if name == "empty" {
            cloud.intercept(|seen, _| is_release(seen).then(|| Reply::status(200, &[], br#"{"d":[]}"#)));
        }
        let line = running.wait_for("refresh failed: ");
        // An API that cannot be reached, or wants a pause, says nothing about labels.
        let has_way_out = !["429", "hang"].contains(&name);
        let way_out =
            ["cannot read the labels of services: ", "SERVICE_LABELS=false"].map(|text| line.matches(text).count());
        assert!(line.contains(said) && way_out == [usize::from(has_way_out); 2], "{name}: {line}");
        assert_eq!(sidecar.list(), before, "{name}");
        cloud.heal();
        running.wait_for_lines("updated balena.json", 2);
        assert_eq!(targets(&sidecar.list()), ["gw-1 app app 81 -"], "{name}");
    }
}

/// A key that is refused, and a database that is stopped, say nothing about labels.
#[test]
fn a_key_that_reads_no_device_is_not_a_matter_of_labels() {
    for status in [401, 403, 500] {
        let cloud = Cloud::start(with_releases(1));
        cloud.intercept(move |_, _| Some(Reply::status(status, &[], b"")));
        let sidecar = sidecar(&cloud);
        let running = sidecar.start();
        let line = running.wait_for("refresh failed: ");
        assert!(line.contains(&format!("/ answers {status} ").replace('/', &cloud.url())), "{line}");
        assert!(!line.contains("label") && !line.contains("SERVICE_LABELS"), "{line}");
        let (_, hint) = line.split_once(": the API ").unwrap_or_else(|| panic!("{line}"));
        let (hint, _) = hint.split_once("; balena.json does not exist").unwrap_or_else(|| panic!("{line}"));
        assert!(hint.split(' ').count() < 25, "{hint}");
    }
}

#[test]
fn a_server_without_releases_has_no_labels_and_says_so_once() {
    let cloud = Cloud::start(with_releases(2));
    cloud.set_services(1, &[("app", &[("prometheus.io.port", "80")], &[])]);
    cloud.intercept(|seen, _| is_release(seen).then(|| Reply::status(404, &[], b"")));
    let sidecar = sidecar(&cloud).env("EXPORTERS", "9100").env("LOG_LEVEL", "debug");
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2 targets on 2 devices");
    running.wait_for_lines("balena.json is unchanged", 2);
    // It is updated, and knows releases from then on.
    cloud.heal();
    running.wait_for("(devices: +0 -0 ~1)");
    running.signal("TERM");
    let (_, log) = running.wait();
    let warnings = log.iter().filter(|line| line.contains("this server does not know releases")).count();
    assert_eq!(warnings, 1, "{log:#?}");
    assert_eq!(targets(&sidecar.list()), ["gw-1 app app 80 -", "gw-2 - - 9100 -"]);
}

#[test]
fn an_api_that_cannot_be_reached_is_not_a_matter_of_labels() {
    let cloud = Cloud::start(with_releases(1));
    let sidecar = sidecar(&cloud).env("BALENA_API_URL", "http://127.0.0.1:1");
    let running = sidecar.start();
    let line = running.wait_for("refresh failed: ");
    assert!(line.contains("refresh failed: cannot reach http://127.0.0.1:1: ") && !line.contains("labels"), "{line}");
}

#[test]
fn the_name_of_a_service_may_be_no_job_or_too_long_for_a_label() {
    let cloud = Cloud::start(with_releases(1));
    let long = "x".repeat(2000);
    let port = ("prometheus.io.port", "80");
    cloud.set_services(
        1,
        &[
            ("prometheus", &[port], &[]),
            ("two words", &[port], &[]),
            (&long, &[("prometheus.io.port", "81"), ("prometheus.io.job", "app")], &[]),
        ],
    );
    let sidecar = sidecar(&cloud);
    let log = sidecar.oneshot();
    for (name, why) in
        [("prometheus", "is reserved: prometheus is a job of the stack"), ("two words", "is not 1 to 64 of")]
    {
        let start = format!("service {name} of release 1.0.0 of fleet ");
        let line = log.lines().find(|line| line.contains(&start)).unwrap_or_else(|| panic!("{name}: {log}"));
        assert!(line.contains(&format!("its name {why}")) && line.contains("the label prometheus.io.job"), "{line}");
    }
    assert_eq!(targets(&sidecar.list()), ["gw-1 app - 81 -"]);
}

/// A load balancer may answer 404 for a moment. What was known a moment ago is not gone for that.
#[test]
fn a_404_after_labels_were_read_fails_the_refresh_and_drops_no_target() {
    let cloud = Cloud::start(with_releases(2));
    for release in [1, 2] {
        cloud.set_services(release, &[("app", &[("prometheus.io.port", "80")], &[])]);
    }
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2 targets");
    let before = sidecar.list();
    cloud.intercept(|seen, _| is_release(seen).then(|| Reply::status(404, &[], b"")));
    // Its page changes, so that it is mapped again.
    cloud.change(|devices| devices[0]["device_name"] = "renamed".into());
    let line = running.wait_for("refresh failed: cannot read the labels of services: ");
    assert!(line.contains("404 Not Found"), "{line}");
    assert_eq!(sidecar.list(), before);
    cloud.heal();
    running.wait_for("(devices: +0 -0 ~1)");
    assert_eq!(targets(&sidecar.list()), ["renamed app app 80 -", "gw-2 app app 80 -"]);
}

/// Nor what the target file of an earlier run has.
#[test]
fn a_404_at_the_start_drops_no_target_that_labels_declared_before() {
    let cloud = Cloud::start(with_releases(2));
    cloud.set_services(1, &[("app", &[("prometheus.io.port", "80")], &[])]);
    let sidecar = sidecar(&cloud).env("EXPORTERS", "9100");
    sidecar.oneshot();
    let before = sidecar.list();
    assert_eq!(targets(&before), ["gw-1 app app 80 -", "gw-2 - - 9100 -"]);
    cloud.intercept(|seen, _| is_release(seen).then(|| Reply::status(404, &[], b"")));
    let running = sidecar.start();
    let line = running.wait_for("refresh failed: cannot read the labels of services: ");
    assert!(line.contains("404 Not Found") && line.contains("SERVICE_LABELS=false"), "{line}");
    assert_eq!(sidecar.list(), before);
    cloud.heal();
    running.wait_for("balena.json is up to date: 2 targets");
    assert_eq!(sidecar.list(), before);
}

#[test]
fn a_release_of_many_devices_is_asked_for_once() {
    let mut devices = gateways(3);
    devices.iter_mut().for_each(|device| run(device, 9));
    let cloud = Cloud::start(devices);
    cloud.set_services(9, &[("app", &[("prometheus.io.port", "80")], &[])]);
    cloud.intercept(|seen, _| {
        let is_list = is_release(seen) && !seen.target.contains("id%20in%20(");
        is_list.then(|| Reply::status(200, &[], br#"{"d":[]}"#))
    });
    let sidecar = sidecar(&cloud);
    assert!(sidecar.oneshot().contains("3 targets"));
    let asked: Vec<_> = cloud.requests().into_iter().filter(|seen| seen.target.contains("id%20in%20(")).collect();
    assert!(asked.len() == 1 && asked[0].target.contains("id%20in%20(9)&"), "{asked:#?}");
}

#[test]
fn a_release_that_started_in_between_is_fetched_before_the_list_is_published() {
    let cloud = Cloud::start(with_releases(3));
    cloud.set_services(3, &[("app", &[("prometheus.io.port", "80")], &[])]);
    // The list of releases is a moment older than the devices.
    cloud.intercept(|seen, _| {
        let is_list = is_release(seen) && !seen.target.contains("id%20in%20(");
        is_list.then(|| Reply::status(200, &[], br#"{"d":[{"id":1},{"id":2}]}"#))
    });
    let sidecar = sidecar(&cloud);
    sidecar.oneshot();
    assert_eq!(targets(&sidecar.list()), ["gw-3 app app 80 -"]);
    let seen = ["release 200", "release more 200", "device 200", "device more 200", "release by id 200"];
    assert_eq!(asked(&cloud), seen);
}

/// A gateway gives few records at once: the releases alone need a whole window.
#[test]
fn a_refresh_that_a_rate_limit_stops_goes_on_behind_the_releases() {
    let cloud = Cloud::start(with_releases(20));
    cloud.limit_answers(5);
    (1..=20).for_each(|release| cloud.set_services(release, &[("app", &[("prometheus.io.port", "80")], &[])]));
    let mut requests = 0;
    cloud.intercept(move |_, _| {
        requests += 1;
        (requests % 6 == 0).then(|| Reply::status(429, &[("Retry-After", "1")], b""))
    });
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 20 targets on 20 devices");
}

/// One page is of before the change and one of after it, unless all are mapped again.
#[test]
fn labels_that_change_while_a_rate_limit_stops_a_refresh_reach_every_device() {
    let cloud = Cloud::start(with_releases(20));
    cloud.limit_answers(10);
    let declare = |port: &str| {
        (1..=20).for_each(|release| cloud.set_services(release, &[("app", &[("prometheus.io.port", port)], &[])]));
    };
    declare("80");
    let mut limited = Some(Reply::status(429, &[("Retry-After", "1")], b""));
    cloud.intercept(move |seen, _| {
        let is_second = seen.target.starts_with("/v7/device?") && seen.target.contains("id%20gt%2010)");
        if is_second { limited.take() } else { None }
    });
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("refresh failed: ");
    declare("90");
    running.wait_for("updated balena.json: 20 targets on 20 devices (devices: +0 -0 ~20)");
    assert_eq!(sidecar.list().matches(".balena:90\"").count(), 20);
}

#[test]
fn only_port_80_of_a_service_is_reached_by_a_public_url() {
    let cloud = Cloud::start(with_releases(2));
    cloud.set_services(
        1,
        &[("web", &[("prometheus.io.port", "80/x")], &[]), ("app", &[("prometheus.io.port", "8080")], &[])],
    );
    cloud.set_services(2, &[("app", &[("prometheus.io.port", "8080")], &[])]);
    let sidecar = sidecar(&cloud).env("USE_PUBLIC_URLS", "true");
    let log = sidecar.oneshot();
    assert_eq!(targets(&sidecar.list()), ["gw-1 web web 443 /x"]);
    let only = "a public device URL leads to port 80 only";
    assert!(log.contains(&format!("gw-1 (0000000): app at 8080 is left out: {only}")), "{log}");
    assert!(log.contains(&format!("left out gw-2 (0000000): app at 8080: {only}")), "{log}");
}

/// The example of version 0.1 has node_exporter on port 80 and no labels; the stack's default was `node:80` and is `none`.
#[test]
fn after_an_upgrade_from_0_1_the_way_out_is_said_once_at_warn_and_the_list_stays() {
    for public in ["false", "true"] {
        let cloud = Cloud::start(gateways(3));
        let sidecar = sidecar(&cloud).env("USE_PUBLIC_URLS", public).env("LISTEN_ADDRESS", "127.0.0.1:0");
        let mut old = sidecar.command();
        old.args(["--oneshot", "--exporter", "node:80"]);
        assert!(finish(old).status.success());
        let before = sidecar.list();
        let running = sidecar.start();
        running.wait_for("WARN  devices without an exporter are left out");
        running.wait_for("since there would be none left: 3 devices left out (no_exporter: 3)");
        let url = running.wait_for("status on http://");
        let url = url.split_whitespace().last().unwrap();
        cloud.wait_for_requests(cloud.requests().len() + 6, PATIENCE);
        let get = |path: &str| client().get(format!("{url}{path}")).send().unwrap().text().unwrap();
        assert!(get("/metrics").contains("baletheus_devices_left_out{reason=\"no_exporter\"} 3"));
        running.signal("TERM");
        let (_, log) = running.wait();
        assert_eq!(sidecar.list(), before, "the old list stays");
        let warned: Vec<_> = log.iter().filter(|line| line.contains("EXPORTERS=node:80")).collect();
        assert_eq!(warned.len(), 1, "{log:#?}");
        // The way out leads back to where the user was.
        sidecar.env("EXPORTERS", "node:80").oneshot();
    }
}

#[test]
fn check_shows_the_service_and_where_an_exporter_comes_from() {
    let mut devices = with_releases(3);
    set_tag(&mut devices[1], "prometheus.io/exporters", "node:9100");
    let cloud = Cloud::start(devices);
    cloud.set_services(1, &[("app", &[("prometheus.io.port", "8080"), ("prometheus.io.job", "work")], &[])]);
    let sidecar = sidecar(&cloud).env("TUNNEL_URL", "http://127.0.0.1:9").env("OWN_TAGS", "all");
    let run = |args: &[&str]| {
        let mut command = sidecar.command();
        command.arg("check").args(args);
        String::from_utf8(finish(command).stdout).unwrap()
    };
    let table = run(&[]);
    let line = |name: &str| table.lines().find(|line| line.starts_with(name)).expect("a row").to_owned();
    assert!(line("gw-1 ").contains("work      service app  "), "{table}");
    assert!(line("gw-2 ").contains("node      device tag   "), "{table}");
    assert!(line("gw-3 ").contains("prometheus.io.port of a service"), "{table}");
    let rows: Vec<Value> = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!((&rows[0]["service"], &rows[0]["origin"]), (&json!("app"), &json!("service label")));
    assert_eq!((&rows[1]["service"], &rows[1]["origin"]), (&Value::Null, &json!("device tag")));
    assert_eq!(rows[2]["reason"], "no_exporter");
}

#[test]
fn the_simulated_api_answers_as_recorded() {
    let recorded = Recording::read("labels/labels-of-running-releases");
    let body: Value = serde_json::from_slice(&recorded.answer.body).unwrap();
    let releases = body["d"].as_array().unwrap();
    // Each of these releases ran on a device of the fleet with the id 6.
    let device = |(id, release): (u64, &Value)| {
        let mut device = gateway(id);
        device["belongs_to__application"][0]["id"] = json!(6);
        device["is_running__release"] = json!([{ "id": release["id"], "commit": "c0ffee", "raw_version": "1.0.0" }]);
        device
    };
    let cloud = Cloud::start((1..).zip(releases).map(device).collect());
    for release in releases {
        cloud.set_images(release["id"].as_u64().unwrap(), release["release_image"].as_array().unwrap().clone());
    }
    for name in ["labels-of-running-releases", "labels-of-running-releases-304"] {
        let recorded = Recording::read(&format!("labels/{name}"));
        let request = recorded.request.expect("a request");
        let mut asks = client().get(format!("{}{}", cloud.url(), request.target));
        for (header, value) in &request.headers {
            asks = asks.header(header, value.replace("Bearer KEY", &format!("Bearer {}", crate::support::cloud::KEY)));
        }
        let answer = asks.send().unwrap();
        assert!(recorded.answer.status.contains(answer.status().as_str()), "{name}: {}", answer.status());
        assert_eq!(answer.headers().get("etag").and_then(|etag| etag.to_str().ok()), recorded.answer.header("ETag"));
        assert_eq!(answer.text().unwrap(), String::from_utf8_lossy(&recorded.answer.body), "{name}");
    }
    // What the program makes of them: the services of the recorded releases.
    let sidecar = sidecar(&cloud).env("FLEET", "6");
    sidecar.oneshot();
    let listed = targets(&sidecar.list());
    assert_eq!(&listed[..2], ["gw-2 main main 1 /internal/metrics", "gw-2 node node-exporter 9100 -"]);
    // Each has a port, and one service has a `scrape` without a value, which cannot be understood.
    let services: usize = releases.iter().map(|release| release["release_image"].as_array().unwrap().len()).sum();
    assert_eq!(listed.len(), services - 1);
}

/// What an owner's tags say: an `exporters` tag, and a `port` tag.
#[derive(Clone, Debug)]
struct Owner {
    exporters: Option<&'static str>,
    port: Option<&'static str>,
}

fn owner() -> impl Strategy<Value = Owner> {
    let exporters =
        select(&[None, None, Some("a:1,b:2/x"), Some("3"), Some("a:0"), Some("prometheus:1"), Some("")][..]);
    let port = select(&[None, None, Some("4"), Some("5/y"), Some("x"), Some("a:1")][..]);
    (exporters, port).prop_map(|(exporters, port)| Owner { exporters, port })
}

/// The order, written down a second time: names and ports.
fn expected(own: &Owner, fleet: &Owner, label: Option<&str>, options: &str) -> Vec<String> {
    let of_tags = |owner: &Owner| match (owner.exporters, owner.port) {
        (Some("a:1,b:2/x"), _) => Some(vec!["a 1".to_owned(), "b 2".to_owned()]),
        (Some("3"), _) => Some(vec!["- 3".to_owned()]),
        (_, Some("4")) => Some(vec!["- 4".to_owned()]),
        (_, Some("5/y")) => Some(vec!["- 5".to_owned()]),
        _ => None,
    };
    let of_label = || match label {
        Some("6") => Some(vec!["svc 6".to_owned()]),
        Some("7,8/z") => Some(vec!["svc 7".to_owned(), "svc 8".to_owned()]),
        _ => None,
    };
    let of_option = || if options == "9" { vec!["- 9".to_owned()] } else { Vec::new() };
    of_tags(own).or_else(|| of_tags(fleet)).or_else(of_label).unwrap_or_else(of_option)
}

proptest! {
    #[test]
    fn exporters_come_from_the_first_source_that_has_some(
        own in owner(), fleet in owner(), label in select(&[None, Some("6"), Some("7,8/z"), Some("0"), Some("")][..]),
        options in select(&["9", "none"][..]),
    ) {
        let tags = |owner: &Owner| -> Value {
            let all = [("prometheus.io/exporters", owner.exporters), ("prometheus.io/port", owner.port)];
            let there = all.into_iter().filter_map(|(key, value)| Some(json!({ "tag_key": key, "value": value? })));
            there.collect()
        };
        let device = json!({
            "id": 1, "uuid": "a".repeat(32), "device_tag": tags(&own), "is_running__release": [{ "id": 1 }],
            "belongs_to__application": [{ "id": 1, "slug": "a/b", "application_tag": tags(&fleet) }],
        });
        let labels: Vec<_> = label.map(|port| ("prometheus.io.port", port)).into_iter().collect();
        let (rows, releases) = ([(1, device)], [fakes::release(1, "svc", &labels)]);
        let exporters = if options == "9" { exporter::parse_list("9").unwrap() } else { Vec::new() };
        let mut inventory = Inventory::default();
        let mut api = fakes::Rows::new(&rows, 1000).with_releases(&releases, None);
        inventory.refresh(&mut api, &Rules { exporters, own_tags: OwnTags::All, service_labels: true, ..fakes::rules() }).expect("nothing fails");
        let list = String::from_utf8(fakes::list(&inventory)).unwrap();
        let name_and_port = |target: &String| {
            let words: Vec<_> = target.split(' ').collect();
            format!("{} {}", words[1], words[3])
        };
        let found: Vec<_> = targets(&list).iter().map(name_and_port).collect();
        prop_assert_eq!(found, expected(&own, &fleet, label, options));
    }
}
