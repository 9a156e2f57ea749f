//! Asks for the state of the devices, for what runs on them, and for the reports of their supervisors.
//!
//! These values change all the time, so they have their own requests, interval and thread. A failure here does not affect
//! discovery.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use log::Level;

use super::listed_devices::{FleetState, Installs};
use super::record_lists::{RecordList, RecordPages};
use super::reported::{DeviceState, REPORTS, SupervisorReport};
use super::services::{NotRunning, RUNNING, Running};
use crate::backoff::Backoff;
use crate::balena::query::{self, StateFields};
use crate::balena::{Client, Failure, Listing};
use crate::net::{NoThread, threads};

/// A supervisor reports no more often than this:
/// <https://github.com/balena-os/balena-supervisor/blob/master/src/api-binder/report.ts>.
const REPORT_INTERVAL: Duration = Duration::from_secs(300);
/// The most requests for the state from one request for the reports to the next.
const STATES_TO_REPORT: u32 = 5;
/// From one look at whether discovery is limited to the next.
const LIMITED_INTERVAL: Duration = Duration::from_secs(5);
/// From one try to the next of what the API did not know.
const UNKNOWN_INTERVAL: Duration = Duration::from_secs(3600);

/// How to go on without a request.
const WITHOUT_SERVICES: &str = "; --device-services=false (DEVICE_SERVICES=false) turns this request off";
const WITHOUT_REPORTS: &str = "; --device-metrics=false (DEVICE_METRICS=false) turns this request off";

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// From one request for the state of the devices to the next.
    pub interval: Duration,
    /// Whether to ask for what runs on the devices.
    pub services: bool,
    /// Whether to ask for what the supervisors report.
    pub reports: bool,
}

/// Starts a thread that asks for the state of all devices at this interval, and for what else the settings say. `publish` gets
/// what is known as soon as a part of it is new: a failure of one does not affect the others. It asks for nothing while
/// `is_limited`: discovery goes first. `woken` ends a wait.
pub fn watch(
    client: &Client, settings: Settings, woken: Receiver<()>, is_limited: impl Fn() -> bool + Send + 'static,
    publish: impl Fn(&FleetState) + Send + 'static,
) -> Result<(), NoThread> {
    let mut rounds = Rounds::new(client, settings);
    let run = move || {
        loop {
            let limited = settings.interval.min(LIMITED_INTERVAL);
            let wait = if is_limited() { limited } else { rounds.next(&publish) };
            match woken.recv_timeout(wait) {
                Ok(()) => {
                    // Those that came meanwhile ask for the same.
                    woken.try_iter().for_each(drop);
                    rounds.hurry();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => thread::sleep(wait),
            }
        }
    };
    threads::spawn("device-metrics", run)
}

/// All requests, again and again.
struct Rounds {
    settings: Settings,
    states: StateRequests,
    services: ServiceRequests,
    reports: RecordList<SupervisorReport>,
    state_turn: Turn,
    service_turn: Turn,
    report_turn: Turn,
    known: FleetState,
}

impl Rounds {
    fn new(client: &Client, settings: Settings) -> Self {
        let interval = settings.interval;
        let between_reports = interval.saturating_mul(STATES_TO_REPORT).min(REPORT_INTERVAL).max(interval);
        Rounds {
            settings,
            states: StateRequests::new(client),
            services: ServiceRequests::new(client),
            reports: RecordList::new(client, Listing::DevicesWith(REPORTS)),
            state_turn: Turn::new("the state of the devices", "", interval, interval),
            service_turn: Turn::new("the services of the devices", WITHOUT_SERVICES, interval, interval),
            report_turn: Turn::new("the reports of the devices", WITHOUT_REPORTS, interval, between_reports),
            known: FleetState::default(),
        }
    }

    /// Asks for the state, and for what else is due. Gives the wait until the next round.
    fn next(&mut self, publish: &impl Fn(&FleetState)) -> Duration {
        if self.state_turn.ended(self.states.refresh()).is_some() {
            self.known.states = self.states.records.pages();
            self.known.states_read = Some(SystemTime::now());
            publish(&self.known);
        }
        if !self.state_turn.others_may_succeed {
            (self.known.installs, self.known.reports) = (None, RecordPages::default());
            publish(&self.known);
            return self.state_turn.wait;
        }
        if self.settings.services && self.service_turn.is_due() {
            self.known.installs = self.service_turn.ended(self.services.refresh());
            if self.known.installs.is_some() {
                self.known.installs_read = Some(SystemTime::now());
            }
            publish(&self.known);
        }
        if self.settings.reports && self.report_turn.is_due() {
            let renewed = self.report_turn.ended(self.reports.refresh());
            // Old ones would show a disk that fills as it was, with no sign of their age.
            self.known.reports = renewed.map(|()| self.reports.pages()).unwrap_or_default();
            publish(&self.known);
        }
        self.state_turn.wait
    }

    /// Makes everything due.
    fn hurry(&mut self) {
        for turn in [&mut self.service_turn, &mut self.report_turn] {
            turn.due = Instant::now();
        }
    }
}

/// Asks once for the state of the devices and for what runs on them.
pub fn once(client: &Client) -> Result<FleetState, Failure> {
    let (mut states, mut services) = (StateRequests::new(client), ServiceRequests::new(client));
    states.refresh()?;
    let installs = Some(services.refresh()?);
    Ok(FleetState { states: states.records.pages(), installs, ..FleetState::default() })
}

/// When it is time for a request, and what the log says of its failures.
struct Turn {
    about: &'static str,
    /// How to go on without it, if the API refuses this request and no other.
    hint: &'static str,
    every: Duration,
    backoff: Backoff,
    /// From its end to the next time.
    wait: Duration,
    due: Instant,
    /// Whether it succeeded, or failed in a way that is not that of all requests.
    others_may_succeed: bool,
}

impl Turn {
    fn new(about: &'static str, hint: &'static str, interval: Duration, every: Duration) -> Self {
        let backoff = Backoff::new(interval);
        Turn { about, hint, every, backoff, wait: every, due: Instant::now(), others_may_succeed: true }
    }

    fn is_due(&self) -> bool {
        Instant::now() >= self.due
    }

    /// The request has ended. The log has the first of several failures, and the success after them.
    fn ended<T>(&mut self, outcome: Result<T, Failure>) -> Option<T> {
        let failures = self.backoff.failures();
        match &outcome {
            Ok(_) => {
                if failures > 0 {
                    log::info!("{} can be renewed again", self.about);
                }
                self.backoff.succeeded();
                (self.wait, self.others_may_succeed) = (self.every, true);
            }
            Err(failure) => {
                self.others_may_succeed = failure.is_of_this_request();
                let level = if failures == 0 { Level::Warn } else { Level::Debug };
                let hint = if self.others_may_succeed { self.hint } else { "" };
                log::log!(level, "cannot renew {}: {failure}{hint}", self.about);
                self.wait = self.backoff.failed(failure.retry_after);
            }
        }
        self.due = Instant::now() + self.wait;
        outcome.ok()
    }
}

/// The state of the devices, as far as this server knows it.
struct StateRequests {
    records: RecordList<DeviceState>,
    fields: StateFields,
    /// When all was asked for last.
    tried_all: Instant,
    /// What the log has called refused.
    told: StateFields,
}

impl StateRequests {
    fn new(client: &Client) -> Self {
        let (fields, told) = ([true; _], StateFields::default());
        let records = RecordList::new(client, Listing::State(fields));
        StateRequests { records, fields, tried_all: Instant::now(), told }
    }

    fn ask(&mut self) -> Result<(), Failure> {
        self.records.listing = Listing::State(self.fields);
        self.records.refresh()
    }

    /// A server that does not know a field, or a key that may not read one, refuses the whole request: it is asked for the rest
    /// then.
    fn refresh(&mut self) -> Result<(), Failure> {
        if self.tried_all.elapsed() > UNKNOWN_INTERVAL {
            (self.fields, self.tried_all) = ([true; _], Instant::now());
        }
        match self.ask() {
            Err(failure) if failure.is_of_this_request() && self.fields != StateFields::default() => {
                let unknown = self.forget_unknown(failure.clone())?;
                self.ask()?;
                if self.told != unknown {
                    self.told = unknown;
                    log::warn!(
                        "the API refuses {} of devices, so the metrics of it are absent: is the server too old for it, or may the \
                         key not read it? {failure}",
                        query::names(unknown)
                    );
                }
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Stops asking for the fields that are refused, and returns them. If it is none of them, or all requests are, the failure
    /// stays.
    fn forget_unknown(&mut self, failure: Failure) -> Result<StateFields, Failure> {
        self.records.probe(Listing::State(StateFields::default()))?;
        let mut unknown = StateFields::default();
        for index in 0..unknown.len() {
            let mut field = StateFields::default();
            field[index] = self.fields[index];
            match self.records.probe(Listing::State(field)) {
                Err(refused) if refused.is_of_this_request() => unknown[index] = true,
                outcome => outcome?,
            }
        }
        for (field, unknown) in self.fields.iter_mut().zip(unknown) {
            *field &= !unknown;
        }
        if unknown == StateFields::default() { Err(failure) } else { Ok(unknown) }
    }
}

struct ServiceRequests {
    not_running: RecordList<NotRunning>,
    running: RecordList<Running>,
    /// Whether the log has said that names are missing.
    told: bool,
}

impl ServiceRequests {
    fn new(client: &Client) -> Self {
        let not_running = RecordList::new(client, Listing::NotRunning);
        let running = RecordList::new(client, Listing::DevicesWith(RUNNING));
        ServiceRequests { not_running, running, told: false }
    }

    fn refresh(&mut self) -> Result<Installs, Failure> {
        self.not_running.refresh()?;
        self.running.refresh()?;
        let installs = Installs::new(self.not_running.pages(), self.running.pages());
        if !self.told
            && installs.all_not_running().any(|install| install.service.is_none() || install.image.release.is_none())
        {
            self.told = true;
            log::warn!(
                "the API does not name the service or the release of what runs on devices: may the key read services, images and \
                 releases? Without them, services are counted at most"
            );
        }
        Ok(installs)
    }
}
