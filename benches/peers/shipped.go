// The same as shipped without services: the state of the devices, and /metrics by Prometheus' client library.
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	stateFields = "id,is_connected_to_vpn,api_heartbeat_state,last_vpn_event,memory_usage,memory_total," +
		"storage_usage,storage_total,cpu_usage,cpu_temp,is_undervolted"
	stateExpand = "is_running__release($select=id),should_be_running__release($select=id)"
	mib         = 1 << 20
)

type ref []struct{ ID uint64 }
type state struct {
	ID          uint64
	Online      *bool      `json:"is_connected_to_vpn"`
	Heartbeat   *string    `json:"api_heartbeat_state"`
	Since       *time.Time `json:"last_vpn_event"`
	Running     ref        `json:"is_running__release"`
	Should      ref        `json:"should_be_running__release"`
	MemoryUsed  *float64   `json:"memory_usage"`
	MemorySize  *float64   `json:"memory_total"`
	StorageUsed *float64   `json:"storage_usage"`
	StorageSize *float64   `json:"storage_total"`
	CPU         *float64   `json:"cpu_usage"`
	Temperature *float64   `json:"cpu_temp"`
	Undervolted *bool      `json:"is_undervolted"`
}

func desc(name string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("balena_device_"+name, name, append([]string{"uuid"}, labels...), nil)
}

var (
	info = desc("info", "device_name", "device_type", "fleet", "commit", "os_version", "os_variant",
		"supervisor_version", "release")
	heartbeat = desc("heartbeat_state", "state")
	numbers   = []struct {
		desc  *prometheus.Desc
		value func(*state) *float64
	}{
		{desc("online"), func(s *state) *float64 { return flag(s.Online) }},
		{desc("last_connectivity_event_timestamp_seconds"), func(s *state) *float64 {
			if s.Since == nil {
				return nil
			}
			return number(float64(s.Since.UnixMilli()) / 1000)
		}},
		{desc("update_pending"), func(s *state) *float64 {
			if len(s.Should) == 0 {
				return nil
			}
			pending := len(s.Running) == 0 || s.Running[0].ID != s.Should[0].ID
			return flag(&pending)
		}},
		{desc("memory_used_bytes"), func(s *state) *float64 { return times(s.MemoryUsed, mib) }},
		{desc("memory_size_bytes"), func(s *state) *float64 { return times(s.MemorySize, mib) }},
		{desc("storage_used_bytes"), func(s *state) *float64 { return times(s.StorageUsed, mib) }},
		{desc("storage_size_bytes"), func(s *state) *float64 { return times(s.StorageSize, mib) }},
		{desc("cpu_usage_ratio"), func(s *state) *float64 { return times(s.CPU, 0.01) }},
		{desc("cpu_temperature_celsius"), func(s *state) *float64 { return s.Temperature }},
		{desc("undervolted"), func(s *state) *float64 { return flag(s.Undervolted) }},
	}
)

func number(value float64) *float64 { return &value }

func times(value *float64, factor float64) *float64 {
	if value == nil {
		return nil
	}
	return number(*value * factor)
}

func flag(flag *bool) *float64 {
	if flag == nil {
		return nil
	}
	if *flag {
		return number(1)
	}
	return number(0)
}

// What /metrics shows.
type fleetCollector struct {
	sync.Mutex
	devices []device
	states  map[uint64]state
}

func (f *fleetCollector) Describe(descs chan<- *prometheus.Desc) { descs <- info }

func (f *fleetCollector) Collect(metrics chan<- prometheus.Metric) {
	f.Lock()
	devices, states := f.devices, f.states
	f.Unlock()
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	for i := range devices {
		d := &devices[i]
		var kind, slug, commit, version string
		for _, of := range d.DeviceType {
			kind = of.Slug
		}
		for _, of := range d.Fleet {
			slug = of.Slug
		}
		for _, of := range d.Release {
			commit, version = of.Commit, of.Version
		}
		gauge(info, 1, d.UUID, d.DeviceName, kind, slug, commit, d.OSVersion, d.OSVariant, d.SupervisorVersion, version)
		s, ok := states[d.ID]
		if !ok {
			continue
		}
		for _, number := range numbers {
			if value := number.value(&s); value != nil {
				gauge(number.desc, *value, d.UUID)
			}
		}
		if s.Heartbeat != nil {
			gauge(heartbeat, 1, d.UUID, *s.Heartbeat)
		}
	}
}

func init() {
	fleet := &fleetCollector{}
	publish = func(devices []device) {
		fleet.Lock()
		fleet.devices = devices
		fleet.Unlock()
	}
	prometheus.MustRegister(fleet)
	http.Handle("/metrics", promhttp.Handler())
	listener, err := net.Listen("tcp", os.Getenv("LISTEN_ADDRESS"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("status on http://%s\n", listener.Addr())
	go func() { log.Fatal(http.Serve(listener, nil)) }()
	go func() {
		for {
			all, err := fetch[state](stateFields, stateExpand, func(s *state) uint64 { return s.ID })
			if err != nil {
				log.Fatal(err)
			}
			states := make(map[uint64]state, len(all))
			for _, s := range all {
				states[s.ID] = s
			}
			fleet.Lock()
			fleet.states = states
			fleet.Unlock()
			time.Sleep(interval("DEVICE_REFRESH_RATE", time.Minute))
		}
	}()
}
