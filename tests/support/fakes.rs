//! Sources, sinks and clocks that tests hand to the crate's modules. No other file of the tests implements the crate's
//! traits or fills its settings.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use baletheus::balena::{Api, Client, Failure, Fetched, Listing, Query, Reason, Request, Selection, Source};
use baletheus::discovery::earlier_list::StoredDevice;
use baletheus::discovery::inventory::Inventory;
use baletheus::discovery::labels;
use baletheus::discovery::lan::{self, Lan};
use baletheus::discovery::tags::OwnTags;
use baletheus::discovery::target::{Address, Rules};
use baletheus::discovery::{Clock, Discovery, Published, Sink, exporter, target_groups};
use baletheus::key_renewal::KeySource;
use baletheus::liveness::Liveness;
use baletheus::net::EnvProxies;
use baletheus::secret;
use serde_json::{Value, json};

/// All devices over the VPN, with an exporter on port 80 and with every label.
pub fn rules() -> Rules {
    Rules {
        address: Address::Vpn,
        exporters: exporter::parse_list("80").expect("an exporter"),
        own_tags: OwnTags::default(),
        public_domain: "balena-devices.com".into(),
        lan: lan(),
        labels: labels::plain().map(|label| label.name).collect(),
        online_only: false,
        tags: Vec::new(),
        service_labels: false,
    }
}

/// Private networks, on a machine without addresses.
pub fn lan() -> Lan {
    Lan { networks: lan::networks(lan::PRIVATE).expect("networks"), own: Vec::new(), is_told: false }
}

/// The target file of these devices.
pub fn list(inventory: &Inventory) -> Vec<u8> {
    let mut list = Vec::new();
    target_groups::write(inventory.entries(), &mut list).expect("memory takes it");
    list
}

/// The client of the API at this URL.
pub fn api(url: &str) -> Client {
    let key = KeySource::new(secret::key("a-key").expect("a key"), None);
    let (proxies, _) = EnvProxies::from_env(&|_| None);
    let api = Api { url: url.to_owned(), key, proxies, roots: Vec::new(), timeout: Duration::from_secs(60) };
    Client::new(api, Query::new(rules().fields(), &Selection::default())).expect("the platform's certificates")
}

/// How long the failure of a page asks the client to wait, if it does.
pub fn retry_after(client: &Client) -> Option<Duration> {
    client
        .clone()
        .get(Request::Page { list: Listing::Devices, after: 0, limit: 1 }, None)
        .expect_err("a failure")
        .retry_after
}

/// A device and its id in the database, which its record may have or not.
pub type Row = (u64, Value);

/// The API over rows by rising id. The text of an answer is its `ETag`.
pub struct Rows<'a> {
    rows: &'a [Row],
    most: usize,
    fails: Option<usize>,
    /// The most records of an answer, however many are asked for.
    server_limit: usize,
    requests: usize,
    /// Answers that had a body.
    pub bodies: usize,
    releases: Option<&'a [Row]>,
    /// A release that only a request by its id shows, since it started after the list was made.
    late: Option<u64>,
}

impl<'a> Rows<'a> {
    /// An answer holds up to `most` devices.
    pub fn new(rows: &'a [Row], most: usize) -> Self {
        Rows { rows, most, server_limit: usize::MAX, fails: None, requests: 0, bodies: 0, releases: None, late: None }
    }

    /// An answer holds up to `limit` records, as behind a gateway, and says nothing about more.
    pub fn capped(self, server_limit: usize) -> Self {
        Rows { server_limit, ..self }
    }

    /// With the releases that the devices run, of which the list does not show a late one yet.
    pub fn with_releases(self, releases: &'a [Row], late: Option<u64>) -> Self {
        Rows { releases: Some(releases), late, ..self }
    }

    /// A page of these rows, unless this request fails or the page has this `ETag`.
    fn answer(&mut self, rows: Vec<&Value>, etag: Option<&str>) -> Result<Fetched, Failure> {
        self.requests += 1;
        if self.fails == Some(self.requests) {
            return Err(Failure::new(Reason::Timeout, "fails"));
        }
        let body = json!({ "d": rows }).to_string();
        if etag == Some(&body) {
            return Ok(Fetched::Unchanged);
        }
        self.bodies += 1;
        Ok(Fetched::Body { etag: Some(body.clone()), body: body.into_bytes(), room: usize::MAX })
    }

    /// The request with this number fails, counted from 1.
    pub fn failing(self, request: Option<usize>) -> Self {
        Rows { fails: request, ..self }
    }
}

impl Source for Rows<'_> {
    fn name(&self) -> &str {
        "the API"
    }

    fn get(&mut self, request: Request, etag: Option<&str>) -> Result<Fetched, Failure> {
        let releases = || self.releases.expect("labels of services are read only where there are some");
        match request {
            Request::NextId(list, after) => self.get(Request::Page { list, after, limit: 1 }, etag),
            Request::Page { list: Listing::Devices | Listing::DevicesWith(_), after, limit } => {
                if limit > self.most {
                    return Ok(Fetched::TooLarge { etag: None });
                }
                let rows = self.rows.iter().filter(|(id, _)| *id > after).take(limit.min(self.server_limit));
                let rows: Vec<_> = rows.map(|(_, row)| row).collect();
                let fit = self.most / rows.len().max(1);
                let mut answer = self.answer(rows, etag)?;
                if let Fetched::Body { room, .. } = &mut answer {
                    *room = fit;
                }
                Ok(answer)
            }
            Request::Page { list: Listing::Releases, after, limit } => {
                let late = self.late;
                let listed = releases().iter().filter(|(id, _)| *id > after && Some(*id) != late);
                self.answer(listed.take(limit.min(self.server_limit)).map(|(_, release)| release).collect(), etag)
            }
            Request::Page { .. } => unreachable!("discovery does not ask for it"),
            Request::EveryFleet | Request::Owner => unreachable!("it is asked about the key"),
            Request::ReleasesById(ids) => {
                let named = releases().iter().filter(|(id, _)| ids.contains(id));
                self.answer(named.map(|(_, release)| release).collect(), None)
            }
        }
    }

    fn ask(&mut self, _: Request, _: Duration) -> Result<Fetched, Failure> {
        Ok(Fetched::TooLarge { etag: None })
    }
}

/// A release with one service.
pub fn release(id: u64, service: &str, labels: &[(&str, &str)]) -> Row {
    let labels: Vec<_> = labels.iter().map(|(name, value)| json!({ "label_name": name, "value": value })).collect();
    let image = json!([{ "is_a_build_of__service": [{ "service_name": service, "service_label": [] }] }]);
    (id, json!({ "id": id, "raw_version": "1.0.0", "release_image": [{ "image": image, "image_label": labels }] }))
}

/// The API with these bytes as its first page, and no page after it.
pub struct Bytes<'a> {
    pub body: &'a [u8],
    /// The most devices that a page may ask for.
    pub most: usize,
}

impl Source for Bytes<'_> {
    fn name(&self) -> &str {
        "the API"
    }

    fn get(&mut self, request: Request, _: Option<&str>) -> Result<Fetched, Failure> {
        let is_first = match request {
            Request::Page { list: Listing::Devices, after: 0, limit } if limit > self.most => {
                return Ok(Fetched::TooLarge { etag: None });
            }
            Request::Page { list: Listing::Devices | Listing::DevicesWith(_), after, .. } => after == 0,
            Request::NextId(Listing::Devices, after) => after == 0,
            _ => unreachable!("labels of services are not read here"),
        };
        let body = if is_first { self.body } else { br#"{"d":[]}"# };
        Ok(Fetched::Body { etag: None, body: body.to_vec(), room: usize::MAX })
    }

    fn ask(&mut self, _: Request, _: Duration) -> Result<Fetched, Failure> {
        Ok(Fetched::TooLarge { etag: None })
    }
}

/// How a refresh of a `Loop` goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Refresh {
    Written,
    Unchanged,
    Refused,
    /// The API fails, and asks the client to wait that long.
    Fails(Option<Duration>),
    /// The list cannot be written.
    NotWritten,
}

/// What the loop did, in order.
#[derive(Debug, PartialEq)]
pub enum Did {
    /// It asked the source for a page.
    Fetched,
    /// It handed the list to the sink.
    Published,
    /// It told its observer that a refresh took so long, and whether it succeeded.
    Observed(Duration, bool),
    /// It waited until a time that was so far away.
    Waited(Duration),
}

/// A loop of discovery over refreshes that go as planned, by a clock that moves only when the test moves it.
pub struct Loop {
    now: Cell<Instant>,
    plan: RefCell<VecDeque<(Duration, Refresh)>>,
    refresh: Cell<Refresh>,
    woken: Vec<(usize, Duration)>,
    did: RefCell<Vec<Did>>,
}

impl Loop {
    /// Each refresh with the time that its page takes.
    pub fn new(plan: impl IntoIterator<Item = (Duration, Refresh)>) -> Self {
        Loop {
            now: Cell::new(Instant::now()),
            plan: RefCell::new(plan.into_iter().collect()),
            refresh: Cell::new(Refresh::Unchanged),
            woken: Vec::new(),
            did: RefCell::default(),
        }
    }

    /// The wait with this number, counted from 1, ends after that long.
    pub fn wake(mut self, wait: usize, after: Duration) -> Self {
        self.woken.push((wait, after));
        self
    }

    /// Runs until the plan is at its end, where the clock says to stop. Gives what the loop did and what it returned.
    pub fn run(self, interval: Option<Duration>) -> (Vec<Did>, bool) {
        let (mut source, mut sink, mut clock) = (LoopSource(&self), LoopSink(&self), LoopClock(&self));
        let report = |took, outcome: &Result<Published, Failure>, _: &Inventory| {
            self.did.borrow_mut().push(Did::Observed(took, outcome.is_ok()));
        };
        let liveness = Liveness::start();
        let discovery = Discovery::new(&mut source, &mut sink, &report, &liveness, rules(), Vec::new());
        let returned = discovery.run(interval, &mut clock);
        (self.did.into_inner(), returned)
    }

    /// The waits alone.
    pub fn waits(self, interval: Duration) -> Vec<Duration> {
        let (did, _) = self.run(Some(interval));
        let wait = |did| if let Did::Waited(wait) = did { Some(wait) } else { None };
        did.into_iter().filter_map(wait).collect()
    }

    fn push(&self, did: Did) -> usize {
        let mut all = self.did.borrow_mut();
        all.push(did);
        all.iter().filter(|did| matches!(did, Did::Waited(_))).count()
    }
}

struct LoopSource<'a>(&'a Loop);

impl Source for LoopSource<'_> {
    fn name(&self) -> &str {
        "the API"
    }

    fn get(&mut self, _: Request, _: Option<&str>) -> Result<Fetched, Failure> {
        let Loop { now, plan, refresh, .. } = self.0;
        let (took, planned) = plan.borrow_mut().pop_front().expect("no refresh after the clock said to stop");
        self.0.push(Did::Fetched);
        now.set(now.get() + took);
        refresh.set(planned);
        match planned {
            Refresh::Fails(retry_after) => Err(Failure { retry_after, ..Failure::new(Reason::Timeout, "fails") }),
            _ => Ok(Fetched::Body { etag: None, body: br#"{"d":[]}"#.to_vec(), room: usize::MAX }),
        }
    }

    fn ask(&mut self, _: Request, _: Duration) -> Result<Fetched, Failure> {
        Ok(Fetched::TooLarge { etag: None })
    }
}

struct LoopSink<'a>(&'a Loop);

impl Sink for LoopSink<'_> {
    fn name(&self) -> String {
        "the list".to_owned()
    }

    fn stays(&self) -> String {
        String::new()
    }

    fn published(&self) -> Option<Vec<StoredDevice>> {
        Some(Vec::new())
    }

    fn publish(&mut self, _: &Inventory) -> Result<Published, Failure> {
        self.0.push(Did::Published);
        match self.0.refresh.get() {
            Refresh::Written => Ok(Published::Written),
            Refresh::Unchanged => Ok(Published::Unchanged),
            Refresh::Refused => Ok(Published::HeldBack),
            Refresh::NotWritten | Refresh::Fails(_) => Err(Failure::new(Reason::Write, "cannot be written")),
        }
    }
}

struct LoopClock<'a>(&'a Loop);

impl Clock for LoopClock<'_> {
    fn now(&self) -> Instant {
        self.0.now.get()
    }

    fn wait(&mut self, until: Instant) -> bool {
        let Loop { now, plan, woken, .. } = self.0;
        let wait = until.saturating_duration_since(now.get());
        let number = self.0.push(Did::Waited(wait));
        let early = woken.iter().find(|(wait, _)| *wait == number).map(|(_, after)| *after);
        now.set(now.get() + early.unwrap_or(wait));
        !plan.borrow().is_empty()
    }
}
