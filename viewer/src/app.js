// Two linked viewers: a point chosen in one scan moves the other to its match, and shows how alike everything else is.
import { NVImage, Niivue, SHOW_RENDER } from '@niivue/niivue'

const CHOSEN = [0.42, 0.72, 1, 1] // crosshair of the scan in which the point was chosen
const MATCH = [1, 0.75, 0.25, 1] // and of the other one
const UNMATCHED = [0.5, 0.55, 0.6, 1] // as long as it is at no match
const REST_MS = 120 // a crosshair that is dragged asks when it rests
const LARGE_STEP = 5 // voxels
const STEPS = {
  // voxels towards the right, the front and the head of the patient, whose right is on the left
  ArrowLeft: [1, 0, 0],
  ArrowRight: [-1, 0, 0],
  ArrowUp: [0, 0, 1],
  ArrowDown: [0, 0, -1],
  PageUp: [0, 1, 0],
  PageDown: [0, -1, 0],
}
const OPTIONS = {
  backColor: [0.03, 0.04, 0.05, 1],
  crosshairColor: CHOSEN,
  crosshairGap: 16,
  crosshairWidth: 0.6,
  crosshairWidthUnit: 'percent',
  dragAndDropEnabled: false,
  fontColor: [0.75, 0.8, 0.85, 1],
  isRadiologicalConvention: true,
  logLevel: 'error',
  multiplanarShowRender: SHOW_RENDER.NEVER,
  sagittalNoseLeft: true,
}
const ORANGE = { R: [0, 255], G: [0, 150], B: [0, 50], A: [0, 255], I: [0, 255] }
const OPAQUE = { R: [0, 255], G: [0, 255], B: [0, 255], A: [255, 255], I: [0, 255] }
const HEAT = { R: [0, 200, 255, 255], G: [0, 40, 170, 255], B: [90, 60, 20, 160], A: [0, 90, 190, 255], I: [0, 110, 200, 255] }

const find = (id) => document.getElementById(id)
const viewers = {}
const heats = {} // by viewer
let overlay = null
let asking = null // the request under way
let following = false // the crosshair moves because its match was found

function say(state, text) {
  document.body.dataset.state = state
  find('status').textContent = text
}

const millimetres = (point) => point.map((value) => value.toFixed(1)).join(', ') + ' mm'
const other = (side) => (side === 'fixed' ? 'moving' : 'fixed')

async function start() {
  say('loading', 'Loading the scans …')
  const facts = await (await fetch('scans.json')).json()
  find('model').textContent = `model ${facts.model}`
  await Promise.all(['fixed', 'moving'].map((side) => open(side, facts[side])))
  find('warped-label').hidden = !facts.warped
  for (const name of ['overlay', 'style']) {
    document.getElementsByName(name).forEach((radio) => radio.addEventListener('change', () => attempt(showOverlay)))
  }
  find('blend-opacity').addEventListener('input', () => setOpacity('fixed', overlay, overlayOpacity()))
  for (const id of ['show-heat', 'heat-opacity']) find(id).addEventListener('input', showHeat)
  globalThis.viewers = viewers // for the console and for tests
  say('ready', 'Choose a point.')
  find('fixed').focus()
}

async function open(side, { name, description, range }) {
  const canvas = find(side)
  const viewer = new Niivue(OPTIONS)
  viewers[side] = viewer
  await viewer.attachToCanvas(canvas)
  viewer.addColormap('orange', ORANGE)
  viewer.addColormap('opaque', OPAQUE)
  viewer.addColormap('heat', HEAT)
  const [cal_min, cal_max] = range
  await viewer.loadVolumes([{ url: `${side}.nii`, name: `${side}.nii`, colormap: 'gray', cal_min, cal_max }])
  const title = find(`${side}-title`).querySelector('.name')
  title.textContent = `${name} · ${description}`
  title.title = title.textContent
  canvas.setAttribute('aria-label', `${side} scan, ${name}`)
  viewer.onLocationChange = ({ mm }) => {
    find(`${side}-place`).textContent = millimetres([...mm].slice(0, 3))
    if (!following) ask(side, [...mm].slice(0, 3))
  }
  find(`${side}-place`).textContent = millimetres([...viewer.frac2mm(viewer.scene.crosshairPos, 0, true)].slice(0, 3))
  canvas.addEventListener('keydown', (event) => step(event, viewer), { capture: true })
}

// NiiVue has keys of its own, which act only while the pointer is over the canvas: ours replace them.
function step(event, viewer) {
  event.stopImmediatePropagation()
  const move = STEPS[event.key]
  if (!move) return
  event.preventDefault()
  viewer.moveCrosshairInVox(...move.map((value) => value * (event.shiftKey ? LARGE_STEP : 1)))
}

// ---- the match of a point

function ask(side, point) {
  asking?.abort()
  asking = new AbortController()
  mark(side, 'Chosen:', CHOSEN)
  mark(other(side), 'Crosshair:', UNMATCHED)
  rate(null)
  say('matching', 'Matching …')
  const { signal } = asking
  setTimeout(() => signal.aborted || attempt(() => match(side, point, signal)), REST_MS)
}

function mark(side, text, colour) {
  find(side).closest('section').querySelector('.what').textContent = text
  viewers[side].setCrosshairColor(colour)
}

function rate(confidence) {
  find('confidence').value = confidence ?? 0
  find('confidence-number').value = confidence?.toFixed(2) ?? '–'
}

async function match(side, point_mm, signal) {
  const body = JSON.stringify({ scan: side, point_mm })
  const response = await fetch('match', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body, signal })
  const found = await response.json()
  const heat = response.ok ? await heatMap(found.heat) : null
  if (signal.aborted) return
  for (const one of ['fixed', 'moving']) {
    drop(one, heats[one])
    delete heats[one]
  }
  if (!heat) throw new Error(found.error)
  heats[other(side)] = heat
  viewers[other(side)].addVolume(heat)
  rate(found.confidence)
  if (found.point_mm) {
    mark(other(side), 'Match:', MATCH)
    go(other(side), found.point_mm)
  }
  say('matched', found.point_mm ? reason(found) : `No match: this anatomy seems to lie outside the ${other(side)} scan.`)
}

function heatMap(base64) {
  return NVImage.loadFromBase64({ base64, name: 'heat.nii', colormap: 'heat', cal_min: 0, cal_max: 254, opacity: heatOpacity() })
}

function reason({ similarity, return_mm }) {
  return `Similarity ${similarity.toFixed(2)} · the way back ends ${return_mm.toFixed(1)} mm off`
}

function go(side, point) {
  const viewer = viewers[side]
  following = true
  viewer.scene.crosshairPos = viewer.mm2frac(point, 0, true) // true: in the world, whatever its axes
  viewer.createOnLocationChange()
  following = false
  viewer.drawScene()
}

// ---- what is laid over the scans

const heatOpacity = () => (find('show-heat').checked ? Number(find('heat-opacity').value) : 0)
const overlayOpacity = () => (chosen('style') === 'blend' ? Number(find('blend-opacity').value) : 1)
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value

function showHeat() {
  for (const [side, heat] of Object.entries(heats)) setOpacity(side, heat, heatOpacity())
}

async function showOverlay() {
  const [which, style] = [chosen('overlay'), chosen('style')]
  find('style').disabled = which === 'none'
  find('overlay').ariaBusy = 'true'
  lay(null) // at once: the one before is never shown under the new name
  try {
    const image = which === 'none' ? null : await load(`${which}-${style}.nii`, style === 'blend' ? 'orange' : 'opaque')
    if (which !== chosen('overlay') || style !== chosen('style')) return // another was chosen meanwhile
    lay(image)
  } finally {
    find('overlay').ariaBusy = 'false'
  }
}

function lay(image) {
  drop('fixed', overlay)
  overlay = image
  if (!overlay) return
  viewers.fixed.addVolume(overlay)
  viewers.fixed.setVolume(overlay, 1) // below the heat map
}

async function load(name, colormap) {
  const response = await fetch(name)
  if (!response.ok) throw new Error((await response.json()).error)
  const image = new Blob([await response.arrayBuffer()])
  return NVImage.loadFromFile({ file: new File([image], name), name, colormap, cal_min: 0, cal_max: 255, opacity: overlayOpacity() })
}

function drop(side, image) {
  if (image) viewers[side].removeVolume(image)
}

function setOpacity(side, image, opacity) {
  const index = viewers[side].volumes.indexOf(image)
  if (index > 0) viewers[side].setOpacity(index, opacity)
}

// ---- failures are said where the match would be

async function attempt(action) {
  try {
    await action()
  } catch (error) {
    if (error.name !== 'AbortError') say('error', error instanceof TypeError ? 'The server does not answer: start it again.' : error.message)
  }
}

attempt(start)
