//! What an hour costs. It does not take an hour: a minute ends as soon as its work is done, and for many devices only a part of the
//! hour is measured. Each minute has one or two refreshes, requests for the state of the devices and for
//! their services, and a scrape with gzip.

use std::collections::BTreeMap;
use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;

use baletheus::balena::PAGE_SIZE;

use crate::api::{Api, Moment, Traffic};
use crate::support::sidecar::PATIENCE;
use crate::table::{GO_SHIPPED, OWN, SHIPPED, WITHOUT_SERVICES, shown};
use crate::{Racer, path_of};

/// Measured hours. The median counts.
pub const ROUNDS: usize = 3;

/// What is measured, with its unit.
const TITLES: [(&str, f64); 8] = [
    ("CPU, s", 1.0),
    ("requests to the API", 1.0),
    ("to the API, MB", 1e6),
    ("from the API, MB", 1e6),
    ("connections to the API", 1.0),
    ("written, MB", 1e6),
    ("scraped with gzip, MB", 1e6),
    ("peak memory, MiB", 1_048_576.0),
];

/// Series that all have but discovery alone.
const COMMON: [&str; 5] = [
    "balena_device_info{",
    "balena_device_online{",
    "balena_device_heartbeat_state{",
    "balena_device_last_connectivity_event_timestamp_seconds{",
    "balena_device_update_pending{",
];

type Samples = BTreeMap<&'static str, Vec<[f64; TITLES.len()]>>;

/// The API closes idle connections this many times sooner than the real one.
const SPEED: u32 = 20;
/// The pause after each refresh, in which idle connections are closed.
const PAUSE: Duration = Duration::from_millis(400);
/// Up to this many devices, all programs run at once.
const FEW: u64 = 1000;

/// How many minutes are measured with this many devices. The reports of the devices repeat every five minutes.
fn minutes(devices: u64) -> u64 {
    match devices {
        0..=FEW => 60,
        1001..=20_000 => 15,
        _ => 5,
    }
}

pub fn run(sizes: &[u64], rounds: usize) {
    println!("Medians of {rounds}.");
    for refreshes in [2_u64, 1] {
        println!(
            "\n| refresh every {} s | {SHIPPED} | {WITHOUT_SERVICES} | {OWN} | {GO_SHIPPED} | services | of Go |",
            60 / refreshes
        );
        println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
        for devices in sizes {
            let mut samples = Samples::new();
            let mut shared = (*devices > FEW).then(|| Api::fast(*devices, SPEED));
            for _ in 0..rounds {
                let measured = match &mut shared {
                    Some(api) => contenders().map(|is| hour(is, api, *devices, refreshes)),
                    None => at_once(*devices, refreshes),
                };
                let series: Vec<_> = measured.iter().filter(|(_, _, series)| *series > 0).collect();
                assert!(series.iter().all(|one| one.2 == series[0].2), "the series differ: {series:?}");
                for (name, sample, _) in measured {
                    samples.entry(name).or_default().push(sample);
                }
            }
            print(*devices, &samples);
        }
    }
}

fn contenders() -> [(&'static str, Vec<String>); 4] {
    [
        (SHIPPED, vec![path_of("BALETHEUS")]),
        (WITHOUT_SERVICES, vec![path_of("BALETHEUS")]),
        (OWN, vec![path_of("BALETHEUS")]),
        (GO_SHIPPED, vec![path_of("PEER_GO_SHIPPED")]),
    ]
}

type Measured = (&'static str, [f64; TITLES.len()], usize);

fn at_once(devices: u64, refreshes: u64) -> [Measured; 4] {
    thread::scope(|scope| {
        let one = |is| scope.spawn(move || hour(is, &mut Api::fast(devices, SPEED), devices, refreshes));
        contenders().map(one).map(|one| one.join().expect("an hour"))
    })
}

/// What one program takes for an hour, and how many series of devices it shows.
fn hour(is: (&'static str, Vec<String>), api: &mut Api, devices: u64, refreshes: u64) -> Measured {
    let minutes = minutes(devices);
    // Longer than a minute takes here: the reports of the devices come after five of these.
    let mut racer = Racer::new(is, api, ["1h", if devices > FEW { "5s" } else { "1s" }]);
    let is_shipped = racer.name != OWN;
    api.set(Moment::Minute(0));
    racer.start();
    let series = if is_shipped { wait_for_states(&racer) } else { 0 };
    let cpu = racer.settled();
    let (mut traffic, mut scraped) = (Traffic::default(), 0);
    let updates = updates(&racer);
    api.set(Moment::Minute(0));
    for minute in 1..=minutes {
        let moment = Moment::Minute(minute);
        traffic.add(api.set(moment));
        for refresh in 0..refreshes {
            racer.running().signal("HUP");
            let states = if is_shipped { minute } else { 0 };
            wait_for(api, moment, &mut traffic, devices, [(minute - 1) * refreshes + refresh + 1, states]);
        }
        if is_shipped {
            scraped += racer.scrape().len();
        }
    }
    let hours = 60 / minutes;
    let cpu = (racer.settled() - cpu).as_secs_f64();
    let written = (self::updates(&racer) - updates) as u64 * racer.file().1;
    let peak = racer.memory("VmHWM") << 10;
    racer.running = None;
    traffic.add(api.set(Moment::First)); // lets go of a request that was held, too
    let Traffic { wire, opened, requests, .. } = traffic;
    let of_hour = |count: f64| count * hours as f64;
    let sample = [
        of_hour(cpu),
        of_hour(requests as f64),
        of_hour(wire[0] as f64),
        of_hour(wire[1] as f64),
        of_hour(opened as f64),
        of_hour(written as f64),
        of_hour(scraped as f64),
        peak as f64,
    ];
    (racer.name, sample, series)
}

/// Waits until the state of the devices is known, and gives the number of their series.
fn wait_for_states(racer: &Racer) -> usize {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut text = String::new();
        GzDecoder::new(&*racer.scrape()).read_to_string(&mut text).expect("a whole answer");
        if text.contains("\nbalena_device_online{") {
            return text.lines().filter(|line| COMMON.iter().any(|name| line.starts_with(name))).count();
        }
        assert!(Instant::now() < deadline, "{} does not know the state of the devices", racer.name);
        thread::sleep(Duration::from_millis(50));
    }
}

/// How many refreshes wrote the file, by its log.
fn updates(racer: &Racer) -> usize {
    racer.running().log().iter().filter(|line| line.contains("updated")).count()
}

/// Waits until all pages were asked for by this many refreshes and this many requests for the state of the devices, and then until idle
/// connections have been closed.
fn wait_for(api: &mut Api, moment: Moment, traffic: &mut Traffic, devices: u64, rounds: [u64; 2]) {
    let pages = devices / PAGE_SIZE as u64 + 1;
    let deadline = Instant::now() + PATIENCE;
    while traffic.pages_of_each().into_iter().zip(rounds).any(|(asked, rounds)| (asked as u64) < rounds * pages) {
        assert!(Instant::now() < deadline, "{:?} pages of {rounds:?} rounds", traffic.pages_of_each());
        thread::sleep(Duration::from_millis(20));
        traffic.add(api.set(moment));
    }
    thread::sleep(PAUSE);
    traffic.add(api.set(moment));
}

fn print(devices: u64, samples: &Samples) {
    for (at, (title, unit)) in TITLES.into_iter().enumerate() {
        let median = |name| {
            let mut all: Vec<_> = samples.get(name)?.iter().map(|sample| sample[at] / unit).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied()
        };
        let all = [SHIPPED, WITHOUT_SERVICES, OWN, GO_SHIPPED].map(median);
        let ratio = |of: Option<f64>, other: Option<f64>| Some(of? / other.filter(|other| *other > 0.0)?);
        let cells = all.into_iter().chain([ratio(all[0], all[1]), ratio(all[1], all[3])]);
        let cells: Vec<_> = cells.map(|value| value.map_or(String::new(), shown)).collect();
        let title = if at == 0 { format!("**{devices} devices**: {title}") } else { title.into() };
        println!("| {title} | {} |", cells.join(" | "));
    }
}
