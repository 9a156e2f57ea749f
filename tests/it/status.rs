//! What the sidecar shows over HTTP, of itself and of each device.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::binary;
use crate::support::cloud::{Cloud, Reply, Seen, Step};
use crate::support::fleet::{demo_fleet, find, many, set_tag};
use crate::support::sidecar::{PATIENCE, finish};
use crate::support::status::{Status, sidecar};
use crate::support::tools;
use serde_json::{Value, json};

#[test]
fn the_sidecar_tells_how_it_is() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("a 304", |metrics| metrics["baletheus_api_requests_total{code=\"304\"}"] > 0.0);
    assert_eq!(metrics[concat!("baletheus_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}")], 1.0);
    assert_eq!(metrics["baletheus_devices"], 25.0);
    assert_eq!(metrics["baletheus_targets"], 25.0, "gw-oslo has two, and one is left out");
    assert_eq!(metrics["baletheus_devices_left_out{reason=\"switched_off\"}"], 1.0);
    assert_eq!(metrics["baletheus_file_writes_total"], 1.0);
    assert_eq!(metrics["baletheus_file_write_failures_total"], 0.0);
    assert!(metrics["baletheus_refreshes_total"] >= 1.0);
    assert_eq!(metrics["baletheus_refresh_duration_seconds_count"], metrics["baletheus_refreshes_total"]);
    assert!(metrics["baletheus_api_requests_total{code=\"200\"}"] >= 2.0, "whoami, discovery, vitals: {metrics:#?}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - 120.0..=now).contains(&metrics["baletheus_last_refresh_timestamp_seconds"]));
    assert!(metrics["process_resident_memory_bytes"] > 1e6 && metrics["process_open_fds"] > 3.0);

    cloud.intercept(|seen, _| seen.target.contains("$expand=is_of").then(|| Reply::status(503, &[], b"")));
    let failed = "baletheus_refresh_failures_total{reason=\"server_error\"}";
    status.wait_until("a failure", |metrics| metrics.get(failed).is_some_and(|count| *count >= 1.0));
    assert!(status.text("/").contains("<title>baletheus: failing</title>"));
    assert_eq!(status.get("/-/ready").0, 200, "the list still stands");
    cloud.heal();

    // A file that cannot be written is told of as well.
    fs::remove_file(sidecar.path("balena.json")).unwrap();
    fs::create_dir(sidecar.path("balena.json")).unwrap();
    status.running.signal("HUP");
    status.wait_until("a write failure", |metrics| metrics["baletheus_file_write_failures_total"] >= 1.0);
}

#[test]
fn every_device_is_there_without_an_exporter_and_goes_with_the_fleet() {
    let cloud = Cloud::start(demo_fleet());
    cloud.change(|devices| {
        let lamp = find(devices, "lamp-0001");
        lamp["should_be_running__release"] = json!([{ "id": 1, "commit": "0", "raw_version": "9.9.9" }]);
        (lamp["memory_usage"], lamp["cpu_temp"]) = (Value::Null, Value::Null);
        find(devices, "lamp-0002")["is_undervolted"] = json!(true);
        // a share is never more than the whole
        find(devices, "lamp-0002")["cpu_usage"] = json!(250);
        // one that cannot be read costs its own vitals only
        find(devices, "lamp-0003")["memory_usage"] = json!("much");
    });
    let uuid = |name: &str| cloud.change(|devices| find(devices, name)["uuid"].as_str().unwrap().to_owned());
    let (fridge, offline, lamp, low) = (uuid("fridge-01"), uuid("fridge-03"), uuid("lamp-0001"), uuid("lamp-0002"));
    let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true");
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("reports", |metrics| {
        ["online", "memory_size_bytes"]
            .iter()
            .all(|of| metrics.keys().any(|name| name.starts_with(&format!("balena_device_{of}"))))
    });
    let value = |name: &str, uuid: &str| metrics.get(&format!("balena_device_{name}{{uuid=\"{uuid}\"}}")).copied();
    assert_eq!((value("online", &fridge), value("online", &offline)), (Some(1.0), Some(0.0)));
    assert_eq!((value("update_pending", &fridge), value("update_pending", &lamp)), (Some(0.0), Some(1.0)));
    let release = |uuid: &str| {
        metrics.keys().find(|name| name.starts_with(&format!("balena_device_update_release{{uuid=\"{uuid}\"")))
    };
    let expected = format!("balena_device_update_release{{uuid=\"{lamp}\",release=\"9.9.9\"}}");
    assert_eq!((release(&lamp), release(&fridge)), (Some(&expected), None), "fridge-01 runs what it should");
    assert_eq!(value("last_connectivity_event_timestamp_seconds", &fridge), Some(1_795_330_772.104));
    assert_eq!(metrics[&format!("balena_device_heartbeat_state{{uuid=\"{fridge}\",state=\"online\"}}")], 1.0);
    assert_eq!(metrics[&format!("balena_device_heartbeat_state{{uuid=\"{offline}\",state=\"offline\"}}")], 1.0);
    let mib = 1_048_576.0;
    assert_eq!(value("memory_size_bytes", &fridge), Some(3792.0 * mib));
    assert_eq!(value("memory_used_bytes", &fridge), Some(948.0 * mib));
    assert_eq!(value("storage_size_bytes", &fridge), Some(28_100.0 * mib));
    assert_eq!(value("storage_used_bytes", &fridge), Some(5620.0 * mib));
    assert_eq!((value("cpu_usage_ratio", &fridge), value("cpu_usage_ratio", &low)), (Some(0.07), Some(1.0)));
    assert_eq!(value("cpu_temperature_celsius", &fridge), Some(51.0));
    assert_eq!((value("undervolted", &fridge), value("undervolted", &low)), (Some(0.0), Some(1.0)));
    assert_eq!((value("memory_used_bytes", &lamp), value("cpu_temperature_celsius", &lamp)), (None, None), "null");
    assert_eq!(value("memory_size_bytes", &uuid("lamp-0003")), None);
    assert!(metrics.keys().filter(|name| name.starts_with("balena_device_info{")).count() == 25, "left out or not");
    let info = metrics.keys().find(|name| name.contains(&fridge) && name.starts_with("balena_device_info{")).unwrap();
    for label in [
        "device_name=\"fridge-01\"",
        "fleet=\"polar-foods/cold-chain\"",
        "device_type=\"raspberrypi4-64\"",
        "release=\"1.9.0\"",
        "os_version=\"balenaOS 6.1.24\"",
        "os_variant=\"prod\"",
        "supervisor_version=\"16.7.6\"",
    ] {
        assert!(info.contains(label), "{label} is not in {info}");
    }
    cloud.change(|devices| devices.retain(|device| device["uuid"] != *fridge));
    status.wait_until("a removal", |metrics| !metrics.keys().any(|name| name.contains(&fridge)));
}

/// The tag of the device beats its fleet's. A muted device is scraped as before, with the same labels.
#[test]
fn a_tag_mutes_the_alerts_of_a_device() {
    const ALERT: &str = "prometheus.io/alert";
    const NAMES: [(&str, Option<&str>, bool); 5] = [
        ("fridge-01", Some("false"), true),
        ("fridge-02", Some("maybe"), true), // counts as absent
        ("fridge-04", None, true),
        ("fridge-05", Some("true"), false),
        ("gw-oslo", None, false),
    ];
    let mut devices = demo_fleet();
    for device in &mut devices {
        if device["belongs_to__application"][0]["slug"] == "polar-foods/cold-chain" {
            let tags = device["belongs_to__application"][0]["application_tag"].as_array_mut().unwrap();
            tags.push(json!({ "tag_key": ALERT, "value": " Off " }));
        }
    }
    let mut uuids = Vec::new();
    for (name, tag, _) in NAMES {
        let device = find(&mut devices, name);
        tag.into_iter().for_each(|value| set_tag(device, ALERT, value));
        uuids.push(device["uuid"].as_str().unwrap().to_owned());
    }
    set_tag(find(&mut devices, "fridge-04"), "prometheus.io/scrape", "false"); // left out, and muted all the same
    let cloud = Cloud::start(devices);
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let metrics =
        status.wait_until("devices", |metrics| metrics.keys().any(|name| name.starts_with("balena_device_info{")));
    for ((name, _, is_muted), uuid) in NAMES.iter().zip(&uuids) {
        let info = metrics.keys().find(|info| info.starts_with("balena_device_info{") && info.contains(uuid)).unwrap();
        assert_eq!(
            (info.contains("alert="), info.contains(",alert=\"false\"")),
            (*is_muted, *is_muted),
            "{name}: {info}"
        );
    }
    assert!(!sidecar.list().contains("\"alert\""), "{}", sidecar.list());
    let bad = status.running.wait_for("tag prometheus.io/alert of fridge-02");
    assert!(bad.contains("is \"maybe\"") && bad.contains("counts as absent"), "{bad}");
}

/// The age of what balenaCloud says of the devices can be seen, and grows while it does not answer.
#[test]
fn the_last_state_of_the_devices_has_its_time() {
    const NAME: &str = "baletheus_last_device_refresh_timestamp_seconds";
    let cloud = Cloud::start(demo_fleet());
    cloud.intercept(|seen, _| seen.target.contains("heartbeat").then(|| Reply::status(503, &[], b"")));
    let sidecar = sidecar(&cloud).env("DEVICE_REFRESH_RATE", "1s");
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("a list", |metrics| metrics["baletheus_devices"] > 0.0);
    assert_eq!(metrics[NAME], 0.0);
    cloud.heal();
    let first = status.wait_until("a state", |metrics| metrics[NAME] > 1.7e9)[NAME];
    status.wait_until("another", |metrics| metrics[NAME] > first);
}

#[test]
fn nothing_of_it_is_asked_for_without_a_listener_and_discovery_stays_304() {
    let cloud = Cloud::start(demo_fleet());
    let quiet = sidecar(&cloud).env("LISTEN_ADDRESS", "");
    let running = quiet.start();
    running.wait_for("updated balena.json");
    cloud.wait_for_requests(4, PATIENCE);
    assert!(!cloud.requests().iter().any(|seen| seen.target.contains("heartbeat")));
    drop(running);

    cloud.clear_requests();
    let loud = sidecar(&cloud);
    let _status = Status::start(&loud);
    cloud.wait_for_requests(16, PATIENCE);
    let requests = cloud.requests();
    let vitals: Vec<_> = requests.iter().filter(|seen| seen.target.contains("heartbeat")).collect();
    assert!(vitals.len() >= 2 && !vitals[0].target.contains("memory_usage"), "{vitals:#?}");
    let discovery: Vec<_> = requests.iter().filter(|seen| seen.target.contains("is_of__device_type")).collect();
    assert!(discovery.len() >= 2 && discovery[1..].iter().all(|seen| seen.status == 304), "{discovery:#?}");
}

/// Supervisors report every five minutes at most, so that their reports need not be asked for as often as the state.
#[test]
fn reports_are_asked_for_with_every_fifth_request_and_do_not_change_the_state() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true").env("REFRESH_RATE", "1h");
    let report = |mib: u32| {
        cloud.change(|devices| devices.iter_mut().for_each(|device| device["memory_usage"] = json!(mib)));
    };
    report(100);
    let status = Status::start(&sidecar);
    let reported = |mib: f64| {
        status.wait_until("a report", |metrics| {
            let used = metrics.iter().filter(|(name, _)| name.starts_with("balena_device_memory_used_bytes{"));
            used.clone().count() == 25 && used.map(|(_, value)| *value).all(|value| value == mib * 1_048_576.0)
        })
    };
    reported(100.0);
    report(200);
    let metrics = reported(200.0);
    assert!(metrics.keys().any(|name| name.starts_with("balena_device_online{")));
    let requests = cloud.requests();
    let asks = |seen: &Seen, field: &str| seen.target.contains(field);
    let reports: Vec<_> = (0..requests.len()).filter(|at| asks(&requests[*at], "memory_usage")).collect();
    let states: Vec<_> = requests.iter().filter(|seen| asks(seen, "heartbeat")).collect();
    assert!(states.iter().all(|seen| !asks(seen, "memory_usage")), "{states:#?}");
    assert!(states.iter().skip(1).all(|seen| seen.status == 304), "{states:#?}");
    let between = |pair: &[usize]| requests[pair[0]..pair[1]].iter().filter(|seen| asks(seen, "heartbeat")).count();
    // Five intervals, in which a busy machine asks less often.
    assert!(reports.len() > 1 && reports.windows(2).all(|pair| (2..=5).contains(&between(pair))), "{requests:#?}");
}

/// Waits until the metrics of each request are there.
fn wait_for_all(status: &Status) {
    status.wait_until("the metrics of each request", |metrics| {
        let has = |name: &str| metrics.keys().any(|key| key.starts_with(&format!("balena_device_{name}{{")));
        ["online", "service_status", "memory_size_bytes"].into_iter().all(has)
    });
}

#[test]
fn the_readme_has_every_metric() {
    let cloud = Cloud::start(demo_fleet());
    cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true");
    let status = Status::start(&sidecar);
    status.running.wait_for("refresh failed");
    cloud.heal();
    status.running.signal("HUP");
    wait_for_all(&status);
    let text = status.text("/metrics");
    let help = text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '));
    let ours = help.filter(|(name, _)| name.starts_with("bale"));
    let row = |(name, about): (&str, &str)| format!("| `{name}` | {} |", about.trim_end_matches('.'));
    let table = ["| metric | meaning |", "| --- | --- |"]
        .map(str::to_owned)
        .into_iter()
        .chain(ours.map(row))
        .collect::<Vec<_>>();
    let document = include_str!("../../docs/metrics.md");
    let found = document.split_once("<!-- metrics:").expect("a mark").1.split_once("-->\n").unwrap().1;
    let found: Vec<_> = found.lines().take_while(|line| !line.is_empty()).collect();
    assert_eq!(found, table, "the table in docs/metrics.md has to be:\n{}\n", table.join("\n"));
}

#[test]
fn health_is_an_exit_code() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let code = |args: &[&str], listen: &str| {
        let mut command = Command::new(binary::path());
        command.arg("health").args(args).env_clear().env("LISTEN_ADDRESS", listen);
        let output = finish(command);
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let port = status.address.port();
    assert_eq!(code(&[], &status.address.to_string()).0, Some(0));
    assert_eq!(code(&[&format!("http://127.0.0.1:{port}/")], "").0, Some(0));
    // the endpoint listens on 127.0.0.1 only, and localhost is that too
    assert_eq!(code(&[], &format!(":{port}")).0, Some(0));
    let nothing = "baletheus: no URL is given, and LISTEN_ADDRESS is not set: set one of them\n";
    assert_eq!(code(&[], ""), (Some(2), nothing.into()));
    assert_eq!(code(&[&format!("127.0.0.1:{port}")], "").0, Some(0));
    for url in ["http://me:of-mine@127.0.0.1:1", "http://127.0.0.1:1?of-mine", "ftp://127.0.0.1:1", "http://"] {
        let (failed, told) = code(&[url], "");
        assert!(failed == Some(2) && told.contains("no URL such as") && !told.contains("of-mine"), "{url}: {told}");
    }
    let (failed, told) = code(&[&cloud.url()], "");
    assert!(failed == Some(1) && told.contains("answers 404"), "{told}");
    drop(status);
    let (failed, told) = code(&[], &format!("127.0.0.1:{port}"));
    assert!(failed == Some(1) && told.contains("does baletheus run, and listen there"), "{told}");
    // What answers there may be another program: its answer drips for a minute, and would clear a terminal.
    cloud.intercept(|_, _| {
        let head = Step::Send(b"HTTP/1.1 503 Service Unavailable\r\n\r\nno \x1b[2J".into());
        let drop = [Step::Pause(Duration::from_secs(1)), Step::Send(b"x".into())];
        Some(Reply::steps([head].into_iter().chain(drop.into_iter().cycle().take(120))))
    });
    let start = Instant::now();
    let (failed, told) = code(&[&cloud.url()], "");
    assert!(failed == Some(1) && told.contains("answers 503 Service Unavailable: no \\u{1b}[2J"), "{told:?}");
    assert!(start.elapsed() < Duration::from_secs(110), "not before the 120 bytes have come: {:?}", start.elapsed());
}

#[test]
fn vitals_that_fail_fail_no_discovery() {
    let cloud = Cloud::start(demo_fleet());
    cloud.intercept(|seen, _| seen.target.contains("heartbeat").then(|| Reply::status(500, &[], b"")));
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    status.running.wait_for("cannot renew the state of the devices");
    let metrics = status.wait_until("a refresh", |metrics| metrics["baletheus_refreshes_total"] >= 2.0);
    let failures = metrics.iter().filter(|(name, _)| name.starts_with("baletheus_refresh_failures_total"));
    let failures: Vec<_> = failures.map(|(_, count)| *count).collect();
    assert!(failures.len() > 10 && failures.iter().all(|count| *count == 0.0), "{metrics:#?}");
    cloud.heal();
    status.running.wait_for("the state of the devices can be renewed again");
}

/// The API gives a field another type, so that no record can be read.
#[test]
fn a_state_of_which_nothing_can_be_read_is_no_state() {
    let cloud = Cloud::start(demo_fleet());
    let set = |value: Value| {
        cloud.change(|devices| devices.iter_mut().for_each(|it| it["is_connected_to_vpn"] = value.clone()))
    };
    set(json!("new"));
    let status = Status::start(&sidecar(&cloud));
    let line = status.running.wait_for("cannot renew the state of the devices");
    assert!(line.contains("none of the devices can be read: invalid type: string"), "{line}");
    assert_eq!(status.metrics()["baletheus_last_device_refresh_timestamp_seconds"], 0.0);
    set(Value::Null);
    status.running.wait_for("the state of the devices can be renewed again");
}

/// The API gives a field of one device another type: the others keep their metrics. A date that is none costs only its metric.
#[test]
fn a_state_that_cannot_be_read_is_named_once() {
    let cloud = Cloud::start(demo_fleet());
    let (broken, uuid) = cloud.change(|devices| {
        devices[1]["last_vpn_event"] = json!(5);
        devices[2]["is_connected_to_vpn"] = json!(true);
        (devices[1]["id"].clone(), devices[2]["uuid"].as_str().unwrap().to_owned())
    });
    let date = |date: &str| cloud.change(|devices| devices[2]["last_vpn_event"] = json!(date));
    let status = Status::start(&sidecar(&cloud));
    let told = "the API gives 1 record that cannot be read, so metrics are absent: the first, with the id";
    let line = status.running.wait_for(told);
    assert!(line.contains(&format!("the id {broken}: invalid type: integer")), "{line}");
    let online = format!("balena_device_online{{uuid=\"{uuid}\"}}");
    for (is_online, value) in [(true, 1.0), (false, 0.0)] {
        cloud.change(|devices| devices[2]["is_connected_to_vpn"] = json!(is_online));
        status.wait_until("another device", |metrics| metrics.get(&online) == Some(&value));
    }
    assert_eq!(status.running.log().iter().filter(|line| line.contains(told)).count(), 1);

    // What can be read again and then not any more is named again.
    let since = format!("balena_device_last_connectivity_event_timestamp_seconds{{uuid=\"{uuid}\"}}");
    for count in 2..4 {
        date("garbage");
        let metrics = status.wait_until("no date", |metrics| !metrics.contains_key(&since));
        assert_eq!(metrics.get(&online), Some(&0.0));
        let line = status.running.wait_for_lines(told, count);
        assert!(line.ends_with("last_vpn_event is no date"), "{line}");
        date("2026-11-30T00:00:00.000Z");
        status.wait_until("a date", |metrics| metrics.contains_key(&since));
    }
}

/// A disk that fills must not look as it did when it was read last.
#[test]
fn what_supervisors_reported_ends_with_the_first_request_that_fails() {
    let shows = |metrics: &BTreeMap<String, f64>| {
        metrics.keys().any(|name| name.starts_with("balena_device_storage_used_bytes{"))
    };
    // The request for the reports fails, or the one for the state, after which they are not asked for.
    for (field, status_code) in [("memory_usage", 500), ("heartbeat", 503)] {
        let cloud = Cloud::start(demo_fleet());
        let status = Status::start(&sidecar(&cloud).env("DEVICE_METRICS", "true").env("DEVICE_REFRESH_RATE", "1s"));
        status.wait_until("reports", shows);
        cloud.intercept(move |seen, _| seen.target.contains(field).then(|| Reply::status(status_code, &[], b"")));
        status.wait_until("no reports", |metrics| !shows(metrics));
        cloud.heal();
        status.wait_until("reports again", shows);
    }
}

/// Whatever becomes of one of the two requests, what the other one brings is published.
#[test]
fn the_state_and_the_reports_of_devices_do_not_wait_for_each_other() {
    let hint = "; --device-metrics=false (DEVICE_METRICS=false) turns this request off";
    let [state, reports] = [("heartbeat", "the state of the devices"), ("memory_usage", "the reports of the devices")];
    let shows = |metrics: &BTreeMap<String, f64>, name: &str| metrics.keys().any(|key| key.starts_with(name));
    for ((field, about), (shown, hidden), hint) in [
        (state, ("balena_device_memory_used_bytes{", "balena_device_online{"), ""),
        (reports, ("balena_device_online{", "balena_device_memory_used_bytes{"), hint),
    ] {
        let cloud = Cloud::start(demo_fleet());
        cloud.intercept(move |seen, _| seen.target.contains(field).then(|| Reply::status(500, &[], b"")));
        let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true");
        let status = Status::start(&sidecar);
        let line = status.running.wait_for(&format!("cannot renew {about}"));
        assert!(line.ends_with(&format!("asked for{hint}")), "{line}");
        let metrics = status.wait_until("the other", |metrics| shows(metrics, shown));
        assert!(!shows(&metrics, hidden), "{metrics:#?}");
        assert_eq!(metrics["baletheus_last_device_refresh_timestamp_seconds"] > 0.0, shown.contains("online"));
        cloud.heal();
        status.running.wait_for(&format!("{about} can be renewed again"));
        status.wait_until("both", |metrics| shows(metrics, hidden));
    }
}

#[test]
fn ready_and_targets_wait_for_the_first_list_and_healthy_does_not() {
    let cloud = Cloud::start(demo_fleet());
    cloud.intercept(|_, _| Some(Reply::status(429, &[("Retry-After", "3000")], b"")));
    let sidecar = sidecar(&cloud).env("DEVICE_REFRESH_RATE", "1h");
    let status = Status::start(&sidecar);
    status.running.wait_for("refresh failed");
    for path in ["/-/ready", "/targets"] {
        let (code, _, body) = status.get(path);
        let body = String::from_utf8(body).unwrap();
        assert!(code == 503 && body.contains("there is no list yet") && body.contains("429"), "{path}: {code} {body}");
    }
    // a wait that was announced is no hang
    assert_eq!(status.text("/-/healthy"), "healthy\n");
    cloud.heal();
    status.running.signal("HUP");
    status.wait_until("a list", |metrics| metrics["baletheus_devices"] > 0.0);
    // The state waited for discovery, and not for its own interval.
    let has_state =
        |metrics: &BTreeMap<String, f64>| metrics.keys().any(|name| name.starts_with("balena_device_online{"));
    status.wait_until("the state", has_state);
    assert_eq!(status.text("/-/ready"), "ready\n");
    let (_, head, body) = status.get("/targets");
    assert!(head.contains("content-type: application/json\r\n"), "{head}");
    assert_eq!(String::from_utf8(body).unwrap(), sidecar.list());
}

#[test]
fn metrics_and_targets_are_packed_for_those_who_accept_gzip() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true");
    let status = Status::start(&sidecar);
    wait_for_all(&status);
    let lines = |text: &str| text.lines().filter(|line| line.contains("balena_device")).count();
    for (accepted, packs) in [
        ("gzip", true),
        ("gzip, deflate, br, zstd", true),
        ("deflate, GZIP;q=0.5", true),
        ("*", false),
        ("gzip;q=0", false),
        ("gzip; q=0.0, *", false),
        ("*;q=0", false),
        ("identity", false),
        ("gzipped", false),
        ("", false),
    ] {
        for path in ["/targets", "/metrics"] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept-Encoding: {accepted}\r\n\r\n");
            let (code, head, body) = status.send(&request);
            assert_eq!((code, head.contains("content-encoding: gzip\r\n")), (200, packs), "{accepted}: {head}");
            assert!(head.contains("vary: accept-encoding\r\n"), "{head}");
            let mut text = String::new();
            if packs {
                flate2::read::GzDecoder::new(&*body).read_to_string(&mut text).expect("gzip");
            } else {
                text = String::from_utf8(body).expect("UTF-8");
            }
            if path == "/targets" {
                assert_eq!(text, sidecar.list());
            } else {
                assert_eq!(lines(&text), lines(&status.text("/metrics")), "{accepted}");
            }
        }
    }
    let (code, head, body) = status.send("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(code == 200 && head.contains("content-type: text/plain; version=0.0.4") && body.is_empty(), "{head}");
}

/// The client's buffer is small, so that most of the answer is not made yet when the list changes.
#[test]
fn an_answer_shows_one_moment_even_to_a_slow_reader() {
    let cloud = Cloud::start(many(3000));
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    status.wait_until("a list", |metrics| metrics["baletheus_devices"] == 3000.0);
    let before = sidecar.list();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    socket.connect(&status.address.into()).expect("it listens");
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"GET /targets HTTP/1.0\r\n\r\n").expect("it reads");
    let mut answer = vec![0; 100];
    stream.read_exact(&mut answer).expect("it answers");
    cloud.change(|devices| {
        for device in devices.iter_mut() {
            device["device_name"] = json!("another name");
        }
    });
    status.running.signal("HUP");
    let another = |list: &str| list.matches("another name").count();
    // A refresh may have asked for its first page before the change.
    let deadline = Instant::now() + PATIENCE;
    while another(&sidecar.list()) < 3000 {
        assert!(Instant::now() < deadline, "the list does not change");
        thread::sleep(Duration::from_millis(20));
    }
    stream.read_to_end(&mut answer).expect("the rest");
    let answer = String::from_utf8(answer).expect("UTF-8");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(body == before, "{} of 3000 devices have the new name", another(body));
}

#[test]
fn a_list_that_is_held_back_is_shown_and_the_targets_are_those_that_are_published() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("a list", |metrics| metrics["baletheus_targets"] > 0.0);
    assert_eq!(metrics["baletheus_list_held_back"].to_string(), "0");
    // The file is gone at the same time: what is published is known all the same.
    let list = sidecar.list();
    fs::remove_file(sidecar.path("balena.json")).unwrap();
    let all = cloud.change(std::mem::take);
    let is_held_back = |metrics: &BTreeMap<String, f64>| metrics["baletheus_list_held_back"] > 0.0;
    let metrics = status.wait_until("a list that is held back", is_held_back);
    assert_eq!((metrics["baletheus_targets"], metrics["baletheus_devices"]), (25.0, 0.0));
    let ready = status.text("/-/ready");
    assert!(ready.starts_with("ready; the list was right ") && ready.contains("no scrapable device"), "{ready}");
    let page = status.text("/");
    assert!(page.contains("The new list is held back: ") && page.contains("WRITE_EMPTY=true"), "{page}");
    assert_eq!(status.text("/targets"), list);
    drop(status);
    // A restart knows what is published.
    fs::write(sidecar.path("balena.json"), &list).unwrap();
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("a list that is held back", is_held_back);
    assert_eq!((metrics["baletheus_targets"], metrics["baletheus_devices"]), (25.0, 0.0));
    assert_eq!(status.text("/targets"), list);
    cloud.change(|devices| *devices = all);
    let metrics = status.wait_until("the list", |metrics| !is_held_back(metrics));
    assert_eq!((metrics["baletheus_targets"], metrics["baletheus_devices"]), (25.0, 25.0));
    assert_eq!(status.text("/-/ready"), "ready\n");
}

/// The targets stay, but what is known of the devices is that of now: a release without exporters must not hide their state.
#[test]
fn devices_without_targets_are_under_watch_while_the_list_is_held_back() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    status.wait_until("a list", |metrics| metrics["baletheus_targets"] > 0.0);
    let list = sidecar.list();
    cloud.change(|devices| {
        devices.pop();
        devices.iter_mut().for_each(|device| set_tag(device, "prometheus.io/scrape", "false"));
    });
    let of = |metrics: &BTreeMap<String, f64>, name: &str| metrics.keys().filter(|key| key.starts_with(name)).count();
    let expect = |status: &Status| {
        let metrics = status.wait_until("the devices of now", |metrics| {
            metrics["baletheus_list_held_back"] > 0.0 && of(metrics, "balena_device_online{") == 24
        });
        assert_eq!(of(&metrics, "balena_device_info{"), 24);
        assert_eq!((metrics["baletheus_targets"], metrics["baletheus_devices"]), (25.0, 24.0));
        assert_eq!(status.text("/targets"), list);
        let page = status.text("/");
        assert!(
            page.contains("Devices: 24. Targets: 25.") && page.contains("Left out <span class=\"soft\">(24)"),
            "{page}"
        );
    };
    expect(&status);
    drop(status);
    let status = Status::start(&sidecar);
    expect(&status);
    let ready = status.text("/-/ready");
    assert!(ready.starts_with("ready; the list is the file's") && ready.contains("no scrapable device"), "{ready}");
}

#[test]
fn a_restart_while_the_api_is_down_serves_the_list_of_the_file_and_its_age() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let mut once = sidecar.command();
    once.arg("--oneshot");
    assert_eq!(finish(once).status.code(), Some(0));
    let (list, path) = (sidecar.list(), sidecar.path("balena.json"));
    let written = std::time::SystemTime::now() - Duration::from_secs(2 * 3600 + 60);
    fs::File::options().write(true).open(&path).unwrap().set_modified(written).unwrap();
    cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    let status = Status::start(&sidecar);
    status.running.wait_for("refresh failed");
    let ready = status.text("/-/ready");
    assert!(ready.starts_with("ready; the list is the file's, written 2h 1m"), "{ready}");
    assert!(ready.contains("answers 503 Service Unavailable"), "{ready}");
    let page = status.text("/");
    assert!(
        page.contains("no new list since the start: /targets has the list that the target file had then"),
        "{page}"
    );
    assert_eq!(status.text("/targets"), list);
    let (_, head, body) = status.send("GET /targets HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n");
    assert!(head.contains("content-encoding: gzip\r\n"), "{head}");
    let mut unpacked = String::new();
    flate2::read::GzDecoder::new(&*body).read_to_string(&mut unpacked).expect("gzip");
    assert_eq!(unpacked, list);
    assert_eq!(status.metrics()["baletheus_targets"], 25.0);
    cloud.heal();
    cloud.change(|devices| drop(devices.remove(0)));
    status.running.signal("HUP");
    status.wait_until("a list", |metrics| metrics["baletheus_devices"] > 0.0);
    assert_eq!(status.text("/-/ready"), "ready\n");
    assert_eq!(status.text("/targets"), sidecar.list());
    assert!(sidecar.list() != list, "the list is the old one");
    drop(status);
    // What a crash may leave of a list is not served.
    for other in ["", "[{\"targets\":[\"x:80\"", "\0\0\0", "[{\"labels\":{}}]"] {
        fs::write(&path, other).unwrap();
        cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
        let status = Status::start(&sidecar);
        assert_eq!((status.get("/-/ready").0, status.get("/targets").0), (503, 503), "{other}");
    }
}

#[test]
fn a_disk_that_takes_no_file_keeps_no_list_from_who_reads_it_over_http() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    status.running.wait_for("updated balena.json");
    let path = sidecar.path("balena.json");
    fs::remove_file(&path).unwrap();
    fs::create_dir_all(path.join("folder")).unwrap();
    cloud.change(|devices| drop(devices.remove(0)));
    status.running.signal("HUP");
    status.running.wait_for("refresh failed: cannot write balena.json");
    let mut dry = sidecar.command();
    dry.args(["--dry-run", "--sd-file", "other.json"]);
    let due = String::from_utf8(finish(dry).stdout).unwrap();
    status.wait_until("the list", |metrics| metrics["baletheus_devices"] == 24.0);
    assert_eq!(status.text("/targets"), due);
    assert!(status.text("/-/ready").contains("cannot write balena.json"));
    // What is published is what Prometheus finds in the file.
    assert_eq!(status.metrics()["baletheus_targets"], 25.0);
    fs::remove_dir_all(&path).unwrap();
    status.running.signal("HUP");
    status.wait_until("a file", |metrics| metrics["baletheus_targets"] == 24.0);
    assert_eq!((status.text("/-/ready"), sidecar.list()), ("ready\n".into(), due));
}

#[test]
fn it_answers_while_a_refresh_hangs_and_bad_requests_disturb_nothing() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    status.running.wait_for("updated balena.json");
    cloud.intercept(|_, _| Some(Reply::steps([Step::Hang])));
    status.running.signal("HUP");
    cloud.clear_requests();
    cloud.wait_for_requests(1, PATIENCE);
    assert_eq!(status.text("/-/healthy"), "healthy\n");
    // 1,000 connections that say nothing or little
    let idle: Vec<_> = (0..1000)
        .map(|number: u32| {
            let mut stream = TcpStream::connect(status.address).expect("it listens");
            if number.is_multiple_of(2) {
                let _ = stream.write_all(b"GET /met");
            }
            stream
        })
        .collect();
    assert_eq!(status.text("/-/healthy"), "healthy\n");
    let fds = fs::read_dir(format!("/proc/{}/fd", status.running.id())).unwrap().count();
    assert!(fds < 100, "{fds} file descriptors");
    drop(idle);
    assert_eq!(status.send("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").0, 405);
    assert_eq!(status.get("/nosuch").0, 404);
    assert_eq!(status.get("/metrics?x=y").0, 200);
    assert_eq!(status.send(&format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(100_000))).0, 431);
    assert_eq!(status.send("nonsense\r\n\r\n").0, 400);
    assert_eq!(status.text("/-/healthy"), "healthy\n");
}

#[test]
fn promtool_is_content_with_the_metrics() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true");
    let status = Status::start(&sidecar);
    wait_for_all(&status);
    let text = status.text("/metrics");
    for major in [2, 3] {
        let promtool = tools::prometheus(major).promtool;
        let mut command = Command::new(promtool);
        command.args(["check", "metrics"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.trim().is_empty(), "promtool {major}: {told}\n{text}");
    }
}
