// Drives the page in headless Chromium, for tests/test_view.py: steps in JSON on stdin, what was seen in JSON on stdout.
// A step is {click: [side, [right, down]]} (shares of the axial slice), {press: key, on: side}, {tab: true},
// {check: selector}, {size: [width, height]} or {shot: path}, or several; after each the page comes to rest and is looked at.
import { chromium } from 'playwright-core'
import { text } from 'node:stream/consumers'

const { url, executable, steps } = JSON.parse(await text(process.stdin))
const browser = await chromium.launch({
  executablePath: executable,
  args: [
    '--no-sandbox',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--use-gl=angle',
    '--use-angle=swiftshader',
    '--enable-unsafe-swiftshader',
  ],
})
const page = await browser.newPage({ viewport: { width: 1280, height: 800 } })
const complaints = []
const hosts = new Set()
page.on('console', (message) => ['error', 'warning'].includes(message.type()) && complaints.push(message.text()))
page.on('pageerror', (error) => complaints.push(String(error)))
page.on('request', (request) => request.url().startsWith('http') && hosts.add(new URL(request.url()).hostname))

const seen = []
await page.goto(url)
await rest()
for (const step of steps) {
  if (step.click) await page.mouse.click(...(await onScreen(...step.click)))
  if (step.press) await page.locator(`#${step.on}`).press(step.press)
  if (step.tab) await page.keyboard.press('Tab')
  if (step.check) await page.locator(step.check).click()
  if (step.size) await page.setViewportSize({ width: step.size[0], height: step.size[1] })
  await rest()
  if (step.shot) await page.screenshot({ path: step.shot })
  seen.push(await page.evaluate(look))
}
await browser.close()
console.log(JSON.stringify({ seen, complaints, hosts: [...hosts] }))

async function rest() {
  await page.waitForTimeout(250) // a key or a click is answered after a moment of rest
  await page.waitForFunction(atRest, null, { timeout: 120000 })
}

function atRest() {
  return ['ready', 'matched', 'error'].includes(document.body.dataset.state) && !document.querySelector('[aria-busy=true]')
}

async function onScreen(side, [right, down]) {
  const [left, top, width, height] = await page.evaluate((side) => {
    const { screenSlices, uiData } = globalThis.viewers[side]
    const axial = screenSlices.find(({ axCorSag }) => axCorSag === 0)
    return axial.leftTopWidthHeight.map((value) => value / uiData.dpr)
  }, side)
  const box = await page.locator(`#${side}`).boundingBox()
  return [box.x + left + right * width, box.y + top + down * height]
}

function look() {
  const place = (side) => [...globalThis.viewers[side].frac2mm(globalThis.viewers[side].scene.crosshairPos, 0, true)].slice(0, 3)
  return {
    state: document.body.dataset.state,
    status: document.getElementById('status').textContent,
    fixed: place('fixed'),
    moving: place('moving'),
    marks: [...document.querySelectorAll('.what')].map(({ textContent }) => textContent),
    confidence: document.getElementById('confidence').value,
    layers: Object.fromEntries(Object.entries(globalThis.viewers).map(([side, { volumes }]) => [side, volumes.map(({ name }) => name)])),
    focus: document.activeElement.id || document.activeElement.value || '',
    offered: [...document.querySelectorAll('input[name=overlay]')].filter((radio) => radio.checkVisibility()).map(({ value }) => value),
  }
}
